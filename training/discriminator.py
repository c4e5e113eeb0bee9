"""The discriminator. Training alone uses it; no bundle holds one."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_model.layers import conv3x3


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """A convolutional classifier of real against generated images.

    Attributes:
        widths: channels at each resolution, finest (half the image's size) first.
        residual: the paper's ``rd``: stages with a residual connection.
    """

    widths: tuple[int, ...] = (64, 128, 256)
    residual: bool = False


class _Stage(nn.Module):
    """Two convolutions and, except at the coarsest resolution, a halving of the size."""

    def __init__(self, in_channels: int, out_channels: int, down: bool, residual: bool) -> None:
        super().__init__()
        self.down = down
        self.first = conv3x3(in_channels, in_channels)
        self.second = conv3x3(in_channels, out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False) if residual else None

    def forward(self, h: Tensor) -> Tensor:
        out = self.second(F.leaky_relu(self.first(F.leaky_relu(h, 0.2)), 0.2))
        if self.skip is not None:
            out = (out + self.skip(h)) * 0.5**0.5
        return F.avg_pool2d(out, 2) if self.down else out


class Discriminator(nn.Module):
    """``x (N, C, H, W)`` in [0, 1] to logits ``(N,)``, positive for real."""

    def __init__(self, config: DiscriminatorConfig, image_size: int, channels: int) -> None:
        super().__init__()
        widths = config.widths
        self.stem = conv3x3(4 * channels, widths[0])
        outs = [*widths[1:], widths[-1]]
        self.stages = nn.Sequential(*(
            _Stage(a, b, down=i < len(widths) - 1, residual=config.residual)
            for i, (a, b) in enumerate(zip(widths, outs, strict=True))))
        size = image_size // 2 ** len(widths)
        self.head = nn.Linear(widths[-1] * size * size, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(F.pixel_unshuffle(2 * x - 1, 2))
        h = F.leaky_relu(self.stages(h), 0.2)
        return self.head(h.flatten(1)).squeeze(1).to(torch.float32)
