"""Bijections between integers, exact whatever they are given.

Values of the flow are multiples of ``2**-grid_bits`` and are held as int64. A layer that keeps the
volume maps integers to integers. A layer that stretches a value gives more integers than it takes:
which of them is drawn from the stack, so that stretching *pops* the bits that the finer place is
worth, and the inverse pushes them back. This is local bits-back coding (Ho et al., "Compression
with flows via local bits-back coding", 2019) with uniform noise, in the exact form of Zhang et al.,
"iFlow: Numerically invertible flows for efficient lossless compression via a uniform coder", 2021,
section 3.1: no value can be lost to rounding, and no Gaussian is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coding.errors import Damaged, NotCoded
from coding.stack import MAX_SIZE, Stack

SCALE_BITS = 12  # scales are multiples of 2**-12; a larger number would make uniform draws uneven
MAX_VALUE = 2**36


def check_range(values: np.ndarray) -> None:
    """Check that later sums and products stay within 63 bits.

    Raises:
        NotCoded: a value is too large.
    """
    if max(int(values.max()), -int(values.min())) >= MAX_VALUE:
        raise NotCoded("a value of the flow is out of range")


@dataclass(frozen=True)
class Bins:
    """From pixel values to the flow's input: the bin of level ``p`` is ``edges[p:p + 2]``.

    Attributes:
        edges: ``(257,)``, int64, increasing by 2 or more.
    """

    edges: np.ndarray

    def enter(self, pixels: np.ndarray, stack: Stack) -> np.ndarray:
        """Draw a place in the bin of each of ``pixels``."""
        sizes = np.diff(self.edges)[pixels]
        place = stack.pop_uniform(sizes.ravel()).reshape(sizes.shape)
        entered: np.ndarray = self.edges[pixels] + place
        return entered

    def leave(self, values: np.ndarray, stack: Stack) -> np.ndarray:
        """The pixels, uint8; puts the places in their bins back.

        Raises:
            Damaged: a value is in no bin.
        """
        pixels = np.searchsorted(self.edges, values, side="right") - 1
        if pixels.min() < 0 or pixels.max() > len(self.edges) - 2:
            raise Damaged("a value is no pixel")
        place = values - self.edges[pixels]
        stack.push_uniform(place.ravel(), np.diff(self.edges)[pixels].ravel())
        return pixels.astype(np.uint8)


@dataclass(frozen=True)
class Rotation:
    """Lifting steps; see :class:`export.lifting.Lifting`, whose fields these are."""

    signs: np.ndarray
    firsts: np.ndarray
    pairs: np.ndarray
    outer: np.ndarray
    inner: np.ndarray

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Rotate the channels of ``(C, H, W)``."""
        y = self._flat(x) * self.signs[:, None]
        for r in range(len(self.firsts)):
            a, b, outer, inner = self._round(y, r)
            a += np.rint(outer * b)
            b += np.rint(inner * a)
            a += np.rint(outer * b)
        rotated: np.ndarray = y.astype(np.int64).reshape(x.shape)
        return rotated

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """Undo :meth:`forward` exactly."""
        x = self._flat(y)
        for r in reversed(range(len(self.firsts))):
            a, b, outer, inner = self._round(x, r)
            a -= np.rint(outer * b)
            b -= np.rint(inner * a)
            a -= np.rint(outer * b)
        rotated: np.ndarray = (x * self.signs[:, None]).astype(np.int64).reshape(y.shape)
        return rotated

    def _flat(self, x: np.ndarray) -> np.ndarray:
        check_range(x)  # float64 holds all integers below 2**53
        return x.reshape(x.shape[0], -1).astype(np.float64)

    def _round(
        self, y: np.ndarray, r: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        first, pairs = int(self.firsts[r]), int(self.pairs[r])
        end = first + 2 * pairs
        outer, inner = self.outer[r, :pairs, None], self.inner[r, :pairs, None]
        return y[first:end:2], y[first + 1 : end : 2], outer, inner


def stretch(
    values: np.ndarray, log_scales: np.ndarray, shifts: np.ndarray, stack: Stack
) -> np.ndarray:
    """``values * exp(log_scales) + shifts``; all ``(n,)``, the shifts int64."""
    check_range(values)
    sizes = _sizes(log_scales)
    scaled = values * sizes + stack.pop_uniform(sizes)
    stack.push_uniform(scaled & (2**SCALE_BITS - 1), np.full(len(scaled), 2**SCALE_BITS))
    stretched: np.ndarray = (scaled >> SCALE_BITS) + shifts
    return stretched


def shrink(
    values: np.ndarray, log_scales: np.ndarray, shifts: np.ndarray, stack: Stack
) -> np.ndarray:
    """Undo :func:`stretch`."""
    values = values - shifts
    check_range(values)
    sizes = _sizes(log_scales)
    rest = stack.pop_uniform(np.full(len(values), 2**SCALE_BITS))
    shrunk, place = np.divmod((values << SCALE_BITS) + rest, sizes)
    stack.push_uniform(place, sizes)
    return shrunk


def _sizes(log_scales: np.ndarray) -> np.ndarray:
    if not np.isfinite(log_scales).all():
        raise NotCoded("a scale of the flow is not a number")
    scales = np.exp(np.clip(log_scales, -30.0, 30.0))
    sizes = np.clip(np.rint(scales * 2**SCALE_BITS), 2, MAX_SIZE)
    integers: np.ndarray = sizes.astype(np.int64)
    return integers
