"""Variational dequantisation: a learned position of each value within the bin of its pixel.

Uniform positions make the model put equal density everywhere in a bin. Ho et al., "Flow++:
Improving Flow-Based Generative Models with Variational Dequantization and Architecture Design",
2019, section 3.1, draw them from a conditional flow instead, which is trained by the same bound.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_model.layers import ResidualBlock, conv3x3

# The corners of each 2x2 patch, numbered row by row, in the order in which they are transformed:
# the first two are the one colour of a checkerboard, so that each later one knows its neighbours.
ORDER = (0, 3, 1, 2)
MIDDLE, RANGE = 127.5, 64.0  # of pixel values
# Grey levels, added to how much pixels differ from those around them: a flat image has no detail.
FLOOR = 0.3
EDGE = 1e-6  # no position is closer to the edge of its bin, where its logit would be infinite
MAX_LOG_SCALE, MAX_SHIFT = 2.0, 6.0


class Dequantizer(nn.Module):
    """Maps uniform positions to positions that the model expects, given the pixels.

    Each value is transformed once, ``logit(u') = exp(s) logit(u) + t``, so that its distribution
    has a closed form. ``s`` and ``t`` depend on the image, on the corners of the 2x2 patches
    before it in :data:`ORDER`, and ``t``, linearly, on the channels before it. Initially the
    map is the identity.

    Args:
        channels: of the images.
        width: channels of the networks.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        inputs = 4 * (channels + 3 * (channels + 1))
        self.context = nn.Sequential(conv3x3(inputs, width), ResidualBlock(width))
        self.corners = nn.ModuleList(
            _corner_net(i * channels + width, width, channels) for i in range(len(ORDER))
        )

    def forward(self, images: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Transform positions.

        Args:
            images: ``(N, C, H, W)``, integers from 0 to 255; H and W are even.
            u: the same shape, uniform in [0, 1).

        Returns:
            Positions in [0, 1], of the same shape, and each position's share of the
            log-determinant of the map, ``(N, H, W)``, nats.
        """
        before = F.pixel_unshuffle(torch.logit(u.clamp(EDGE, 1 - EDGE)), 2)
        context = self.context_of(images)
        after: dict[int, Tensor] = {}
        log_scales: dict[int, Tensor] = {}
        for i, corner in enumerate(ORDER):
            log_scale, shift, mixing = self.terms(i, context, list(after.values()))
            values: list[Tensor] = []
            for c, value in enumerate((before[:, corner::4] * log_scale.exp() + shift).split(1, 1)):
                first = c * (c - 1) // 2  # of the factors for this channel
                for k, other in enumerate(values, first):
                    value = value + mixing[:, k : k + 1] * other
                values.append(value)
            after[corner], log_scales[corner] = torch.cat(values, 1), log_scale
        logits, log_scale = (
            torch.stack([of[corner] for corner in range(4)], 2).flatten(1, 2)
            for of in (after, log_scales)
        )
        terms = log_scale + _log_slope(logits) - _log_slope(before)
        log_det_map: Tensor = F.pixel_shuffle(terms, 2).sum(1)
        return F.pixel_shuffle(logits, 2).sigmoid(), log_det_map

    def context_of(self, images: Tensor) -> Tensor:
        """Input of the corners' networks, ``(N, width, H/2, W/2)``, from ``(N, C, H, W)``."""
        context: Tensor = self.context(F.pixel_unshuffle(_features(images), 2))
        return context

    def terms(
        self, index: int, context: Tensor, known: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the network of a corner computes.

        Args:
            index: of the corner in :data:`ORDER`.
            context: of the image, ``(N, width, H/2, W/2)``.
            known: logits of the positions in the corners before it, ``(N, C, H/2, W/2)`` each.

        Returns:
            Log-scales and shifts, ``(N, C, H/2, W/2)``, and the factors of the channels before
            each, ``(N, C (C - 1) / 2, H/2, W/2)``: of the first for the second, of the first and
            the second for the third, and so on.
        """
        bounded = [MAX_SHIFT * torch.tanh(logits / MAX_SHIFT) for logits in known]
        raw = self.corners[index](torch.cat([*bounded, context], 1))
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))  # from autocast's
        c = self.channels
        log_scale = MAX_LOG_SCALE * torch.tanh(raw[:, :c] / MAX_LOG_SCALE)
        shift = MAX_SHIFT * torch.tanh(raw[:, c : 2 * c] / MAX_SHIFT)
        return log_scale, shift, torch.tanh(raw[:, 2 * c :])


def _features(images: Tensor) -> Tensor:
    """Pixel values, and how brightness and colours differ from those around them.

    The position within a bin depends on local contrast. These inputs state it relative to the local
    standard deviation. With raw pixel values alone, the gain in likelihood was a tenth in the same
    training time. Colours vary less than brightness, so they have detail of their own.

    Returns:
        ``(N, 4 C + 3, H, W)``.
    """
    brightness = images.mean(1, keepdim=True)
    values = torch.cat([brightness, images - brightness], 1)
    detail = values - _mean_around(values)
    square = _mean_around(detail.square())
    deviation = square.sqrt() + FLOOR
    return torch.cat(
        [
            (images - MIDDLE) / RANGE,
            detail / deviation,
            detail / (square + FLOOR),
            deviation.log(),
        ],
        1,
    )


def _mean_around(values: Tensor) -> Tensor:
    """The mean over the 3x3 pixels around each."""
    return F.avg_pool2d(values, 3, stride=1, padding=1, count_include_pad=False)


def _corner_net(inputs: int, width: int, channels: int) -> nn.Sequential:
    output = conv3x3(width, 2 * channels + channels * (channels - 1) // 2)
    nn.init.zeros_(output.weight)
    return nn.Sequential(conv3x3(inputs, width), nn.ELU(), output)


def _log_slope(logits: Tensor) -> Tensor:
    """The logarithm of the derivative of the sigmoid."""
    size = logits.abs()
    return -size - 2 * torch.log1p(torch.exp(-size))
