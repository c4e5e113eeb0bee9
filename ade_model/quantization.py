"""Conversion between stored pixels and real numbers ``x``, whose range is [0, 1)."""

from __future__ import annotations

from torch import Tensor

NUM_BITS = 8
NUM_LEVELS = 2**NUM_BITS


def dequantize(images: Tensor, u: Tensor | float) -> Tensor:
    """Spread each stored pixel over its bin: ``x = (images + u) / 256``.

    With ``u`` uniform on [0, 1) the density of ``x`` bounds the probability of ``images`` (Theis et
    al., "A note on the evaluation of generative models", 2016, eq. 3). ``u = 0.5`` is the middle of
    the bin.

    Args:
        images: ``(N, C, H, W)``, integers from 0 to 255 in any real dtype.
        u: the same shape, or a number, in [0, 1).

    Returns:
        ``x``, ``(N, C, H, W)``, in [0, 1).
    """
    x: Tensor = (images + u) / NUM_LEVELS
    return x


def quantize(x: Tensor) -> Tensor:
    """Find the pixel value whose bin holds ``x``: ``clamp(floor(256 x), 0, 255)``, as floats."""
    pixels: Tensor = (x * NUM_LEVELS).floor().clamp(0, NUM_LEVELS - 1)
    return pixels
