"""The discriminators, which training uses and bundles do not contain."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_model.layers import conv3x3
from training.config import DiscriminatorConfig
from training.projected import ProjectedDiscriminator


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
        return self.judge(self.features_of(x))

    def features_of(self, x: Tensor) -> list[Tensor]:
        """What comes before the trained layers: the images."""
        return [x]

    def judge(self, levels: list[Tensor]) -> Tensor:
        """The logits of :meth:`features_of`."""
        (x,) = levels
        h = self.stages(self.stem(F.pixel_unshuffle(2 * x - 1, self.patch)))
        logits: Tensor = self.head(F.leaky_relu(h, 0.2).flatten(1))
        return logits.squeeze(1).to(torch.float32)


def make_discriminator(
    config: DiscriminatorConfig, image_size: int, channels: int
) -> Discriminator | ProjectedDiscriminator:
    """Build a discriminator: from ``x``, ``(N, C, H, W)`` in [0, 1], to logits ``(N, …)``.

    Logits are positive for real images. ``features_of(x)`` needs no training, so that the features
    of generated images serve the steps of both players; ``judge`` turns them into the logits.
    """
    if config.kind == "projected":
        return ProjectedDiscriminator(config.widths, image_size, channels)
    return Discriminator(config, image_size, channels)
