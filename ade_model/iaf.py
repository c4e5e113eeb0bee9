"""An inverse autoregressive step on latents.

Kingma et al., "Improved variational inference with inverse autoregressive flow", 2016, eq. 10 and
11. A network computes each value's shift and scale from the values before it, in raster order and,
at one position, by channel. Sampling the posterior takes one pass. The step belongs to the
inference network and not to the generator.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_LOG_SCALE = 2.0


class MaskedConv(nn.Conv2d):
    """A 3x3 convolution masked to earlier positions and, at its own, to earlier channel groups.

    Args:
        in_channels: in groups of ``in_channels / groups`` that share a place in the order.
        out_channels: likewise.
        groups: places in the order at one position.
        strict: whether a group is hidden from itself too; one layer on each path from input to
            output must be strict.
    """

    mask: Tensor

    def __init__(self, in_channels: int, out_channels: int, groups: int, strict: bool) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        mask = torch.zeros(out_channels, in_channels, 3, 3)
        mask[:, :, 0] = 1
        mask[:, :, 1, 0] = 1
        source = torch.arange(in_channels) // (in_channels // groups)
        target = torch.arange(out_channels) // (out_channels // groups)
        visible = source[None] < target[:, None] if strict else source[None] <= target[:, None]
        mask[:, :, 1, 1] = visible.float()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        return F.conv2d(h, self.weight * self.mask, self.bias, padding=1)


class InverseAutoregressiveStep(nn.Module):
    """``z = (z0 - m(z0)) exp(-s(z0))``, ``m`` and ``s`` autoregressive; initially the identity."""

    def __init__(self, latent_channels: int, context_channels: int) -> None:
        super().__init__()
        width = 2 * latent_channels
        self.context = nn.Conv2d(context_channels, width, 1)
        self.first = MaskedConv(latent_channels, width, latent_channels, strict=True)
        self.second = MaskedConv(width, width, latent_channels, strict=False)
        self.third = MaskedConv(width, 2 * latent_channels, latent_channels, strict=False)
        nn.init.zeros_(self.third.weight)
        nn.init.zeros_(self.third.bias)  # type: ignore[arg-type]  # it has a bias

    def forward(self, z0: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Transform ``z0``.

        Args:
            z0: ``(N, latent_channels, h, w)``.
            context: ``(N, context_channels, h, w)``, features of decoder and encoder.

        Returns:
            ``z`` and the terms of ``log |det dz/dz0|``, both of the shape of ``z0``, nats.
        """
        h = F.elu(self.first(z0) + self.context(context))
        out = self.third(F.elu(self.second(h))).to(z0.dtype)
        shift, raw = out[:, 0::2], out[:, 1::2]  # a channel's two numbers are one group
        log_scale = MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE)
        return (z0 - shift) * (-log_scale).exp(), -log_scale
