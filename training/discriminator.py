"""The discriminators, which training uses and bundles do not contain."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_base.errors import ConfigError
from ade_model.layers import conv3x3
from training.metrics.efficientnet import LEVEL_CHANNELS
from training.projected import ProjectedDiscriminator

KINDS = ("plain", "residual", "projected")


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Configuration of a convolutional classifier of real and generated images.

    Attributes:
        widths: channels after the first convolution and after each stage, which halves the size;
            for ``projected``, channels to which each of four feature levels is mixed, finest first.
        kind: ``residual`` is the paper's ``rd``, with stages as in Gulrajani et al., "Improved
            Training of Wasserstein GANs", 2017; ``plain`` has those of Miyato et al., "Spectral
            Normalization for Generative Adversarial Networks", 2018, without the normalisation;
            ``projected`` is that of :mod:`training.projected`.
        plain_stages: number of final stages that keep the size instead of halving it.
        patch: pixels per side of a position of the first convolution.
    """

    widths: tuple[int, ...] = (64, 128, 256)
    kind: str = "plain"
    plain_stages: int = 0
    patch: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if self.kind not in KINDS:
            raise ConfigError(
                f"the discriminator's kind must be one of {', '.join(KINDS)}, got {self.kind!r}"
            )
        if not self.widths or min(self.widths) < 1:
            raise ConfigError(
                f"d_widths must be one or more integers of at least 1, got {self.widths}"
            )
        if not 0 <= self.plain_stages < len(self.widths):
            raise ConfigError(
                f"d_plain_stages must be from 0 to {len(self.widths) - 1}, the number of stages, "
                f"got {self.plain_stages}"
            )
        if self.kind == "projected" and (
            len(self.widths) != len(LEVEL_CHANNELS) or self.plain_stages
        ):
            raise ConfigError(
                f"a projected discriminator needs {len(LEVEL_CHANNELS)} d_widths and 0 "
                f"d_plain_stages, got {self.widths} and {self.plain_stages}"
            )
        if self.patch < 1:
            raise ConfigError(f"d_patch must be at least 1, got {self.patch}")

    @property
    def halvings(self) -> int:
        """Number of stages that halve the size."""
        return len(self.widths) - 1 - self.plain_stages

    def check_image_size(self, image_size: int) -> None:
        """Check that images of a size suit the stages; a projected discriminator takes any size.

        Raises:
            ConfigError: the size is not a multiple of the patch, or too small for the stages.
        """
        if self.kind == "projected":
            return
        if image_size % self.patch or image_size // self.patch < 2**self.halvings:
            raise ConfigError(
                f"image_size must be a multiple of {self.patch} and at least "
                f"{self.patch * 2**self.halvings} for a discriminator with d_patch {self.patch} "
                f"and {self.halvings} stages that halve the size, got {image_size}"
            )


class _Stage(nn.Module):
    """Two convolutions, of which the first may be strided."""

    def __init__(self, in_channels: int, out_channels: int, down: bool) -> None:
        super().__init__()
        self.first = (
            nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1)
            if down
            else conv3x3(in_channels, out_channels)
        )
        self.second = conv3x3(out_channels, out_channels)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.second(F.leaky_relu(self.first(F.leaky_relu(h, 0.2)), 0.2))
        return out


class _ResidualStage(nn.Module):
    """Two convolutions with a skip connection, which average pooling may halve."""

    def __init__(self, in_channels: int, out_channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.first = conv3x3(in_channels, in_channels)
        self.second = conv3x3(in_channels, out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.second(F.relu(self.first(F.relu(h))))
        if self.down:
            out, h = F.avg_pool2d(out, 2), F.avg_pool2d(h, 2)
        skipped: Tensor = self.skip(h)
        return (out + skipped) * math.sqrt(0.5)


class Discriminator(nn.Module):
    """From ``x``, ``(N, C, H, W)`` in [0, 1], to logits, ``(N,)``, positive for real images."""

    def __init__(self, config: DiscriminatorConfig, image_size: int, channels: int) -> None:
        super().__init__()
        self.patch = config.patch
        self.stem = conv3x3(config.patch**2 * channels, config.widths[0])
        stage = _ResidualStage if config.kind == "residual" else _Stage
        self.stages = nn.Sequential(
            *(
                stage(a, b, down=i < config.halvings)
                for i, (a, b) in enumerate(pairwise(config.widths))
            )
        )
        size = image_size // config.patch // 2**config.halvings
        self.head = nn.Linear(config.widths[-1] * size * size, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stages(self.stem(F.pixel_unshuffle(2 * x - 1, self.patch)))
        logits: Tensor = self.head(F.leaky_relu(h, 0.2).flatten(1))
        return logits.squeeze(1).to(torch.float32)


def make_discriminator(config: DiscriminatorConfig, image_size: int, channels: int) -> nn.Module:
    """Build a discriminator: from ``x``, ``(N, C, H, W)`` in [0, 1], to logits ``(N, …)``.

    Logits are positive for real images.
    """
    if config.kind == "projected":
        return ProjectedDiscriminator(config.widths, image_size, channels)
    return Discriminator(config, image_size, channels)
