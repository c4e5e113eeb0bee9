"""The discriminator. Training alone uses it; no bundle holds one."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_model.layers import conv3x3


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """A convolutional classifier of real against generated images.

    Attributes:
        widths: channels after the first convolution and after each stage; a stage halves the size.
        residual: the paper's ``rd``, stages as in Gulrajani et al., "Improved Training of Wasserstein GANs", 2017;
            else those of Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018,
            without their normalisation.
        plain_stages: so many of the last stages keep the size instead.
        patch: pixels a side that the first convolution takes for one position.
    """

    widths: tuple[int, ...] = (64, 128, 256)
    residual: bool = False
    plain_stages: int = 0
    patch: int = 2


class _Stage(nn.Module):
    """A strided convolution and a plain one."""

    def __init__(self, in_channels: int, out_channels: int, down: bool) -> None:
        super().__init__()
        self.first = (nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1) if down
                      else conv3x3(in_channels, out_channels))
        self.second = conv3x3(out_channels, out_channels)

    def forward(self, h: Tensor) -> Tensor:
        return self.second(F.leaky_relu(self.first(F.leaky_relu(h, 0.2)), 0.2))


class _ResidualStage(nn.Module):
    """Two convolutions beside a skip connection, averaged to half the size."""

    def __init__(self, in_channels: int, out_channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.first = conv3x3(in_channels, in_channels)
        self.second = conv3x3(in_channels, out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        out = self.second(F.relu(self.first(F.relu(h))))
        if self.down:
            out, h = F.avg_pool2d(out, 2), F.avg_pool2d(h, 2)
        return (out + self.skip(h)) * 0.5**0.5


class Discriminator(nn.Module):
    """``x (N, C, H, W)`` in [0, 1] to logits ``(N,)``, positive for real."""

    def __init__(self, config: DiscriminatorConfig, image_size: int, channels: int) -> None:
        super().__init__()
        self.patch = config.patch
        self.stem = conv3x3(config.patch**2 * channels, config.widths[0])
        stage = _ResidualStage if config.residual else _Stage
        halvings = len(config.widths) - 1 - config.plain_stages
        self.stages = nn.Sequential(*(
            stage(a, b, down=i < halvings) for i, (a, b) in enumerate(pairwise(config.widths))))
        size = image_size // config.patch // 2**halvings
        self.head = nn.Linear(config.widths[-1] * size * size, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stages(self.stem(F.pixel_unshuffle(2 * x - 1, self.patch)))
        return self.head(F.leaky_relu(h, 0.2).flatten(1)).squeeze(1).to(torch.float32)
