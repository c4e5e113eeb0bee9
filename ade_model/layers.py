"""Building blocks that the networks of the model share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def divide_among_pixels(values: Tensor, factor: int) -> Tensor:
    """Divide the values of cells, ``(N, h, w)``, evenly among their ``factor x factor`` pixels."""
    pixels = F.interpolate(values[:, None], scale_factor=float(factor), mode="nearest")[:, 0]
    return pixels / factor**2


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, or halves it with ``stride=2``; the bias is zero."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has a bias
    return conv


class ResidualBlock(nn.Module):
    """``h + conv(elu(conv(elu(h))))``, initially the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ELU(), conv3x3(width, width), nn.ELU(), conv3x3(width, width))
        nn.init.zeros_(self.body[-1].weight)  # type: ignore[arg-type]  # a convolution

    def forward(self, h: Tensor) -> Tensor:
        residual: Tensor = self.body(h)
        return h + residual
