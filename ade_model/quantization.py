"""Pixels to real numbers and back. The range of ``x`` is [0, 1), stated here and nowhere else."""

from __future__ import annotations

from torch import Tensor

NUM_BITS = 8
NUM_LEVELS = 2**NUM_BITS


def dequantize(images: Tensor, u: Tensor | float) -> Tensor:
    """Spread each stored pixel over its bin: ``x = (images + u) / 256``.

    With ``u`` uniform on [0, 1) the density of ``x`` bounds the probability of ``images`` (Theis et
    al., "A note on the evaluation of generative models", 2016, eq. 3). ``u = 0.5`` is the bin's
    middle.

    Args:
        images: ``(N, C, H, W)``, whole numbers 0..255 in any real dtype.
        u: the same shape or a number, in [0, 1).

    Returns:
        ``x``, ``(N, C, H, W)``, in [0, 1).
    """
    return (images + u) / NUM_LEVELS


def quantize(x: Tensor) -> Tensor:
    """The pixel whose bin ``x`` lies in: ``clamp(floor(256 x), 0, 255)``, still a float tensor."""
    return (x * NUM_LEVELS).floor().clamp(0, NUM_LEVELS - 1)
