"""Bijections between integers, exact whatever they are given.

Values of the flow are multiples of ``2**-grid_bits`` and are held as int64. A layer that keeps the
volume maps integers to integers. A layer that stretches a value gives more integers than it takes.
Stretching chooses one of these integers with bits popped from the stack; the inverse pushes them
back. This is local bits-back coding (Ho et al., "Compression with flows via local bits-back
coding", 2019) with uniform noise, in the exact form of Zhang et al., "iFlow: Numerically invertible
flows for efficient lossless compression via a uniform coder", 2021, section 3.1: no value can be
lost to rounding, and no Gaussian is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from extensions.codec.errors import Damaged, NotCoded
from extensions.codec.stack import MAX_SIZE, Stack

SCALE_BITS = 12  # scales are multiples of 2**-12; a larger number would make uniform draws uneven
MAX_VALUE = 2**30


def check_range(values: np.ndarray) -> None:
    """Check that later sums and products stay exact: 63 bits of integers, 53 of floats.

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
        pixels, place = self.split(values)
        stack.push_uniform(place.ravel(), np.diff(self.edges)[pixels].ravel())
        return pixels.astype(np.uint8)

    def split(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pixels of values, and their places in the bins.

        Raises:
            Damaged: a value is in no bin.
        """
        pixels = np.searchsorted(self.edges, values, side="right") - 1
        if pixels.min() < 0 or pixels.max() > len(self.edges) - 2:
            raise Damaged("a value is no pixel")
        return pixels, values - self.edges[pixels]


@dataclass(frozen=True)
class Rotation:
    """Lifting steps; see :class:`extensions.codec.lifting.Lifting`.

    The steps' numbers are multiples of ``2**-18``. Together with the limits of the values this
    makes every product and sum a multiple of ``2**-18`` below ``2**35``, which float64 holds
    exactly. So the result does not depend on the order in which a library adds.

    Attributes:
        signs: ``(n,)``, 1 or -1; ``n`` is at most 384.
        steps: ``(steps, n, n)``, float64.
    """

    signs: np.ndarray
    steps: np.ndarray

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Rotate the channels of ``(C, H, W)``."""
        check_range(x)
        y = x.reshape(len(x), -1) * self.signs[:, None].astype(np.float64)
        for step in self.steps:
            added = step @ y
            y += np.rint(added, out=added)
        rotated: np.ndarray = y.astype(np.int64).reshape(x.shape)
        return rotated

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """Undo :meth:`forward` exactly."""
        check_range(y)
        x = y.reshape(len(y), -1).astype(np.float64)
        for step in self.steps[::-1]:
            added = step @ x
            x -= np.rint(added, out=added)
        rotated: np.ndarray = (x * self.signs[:, None]).astype(np.int64).reshape(y.shape)
        return rotated


def stretch(
    values: np.ndarray, log_scales: np.ndarray, shifts: np.ndarray, stack: Stack
) -> np.ndarray:
    """``values * exp(log_scales) + shifts``; all ``(n,)``, the shifts int64."""
    check_range(values)
    sizes = _sizes(log_scales)
    scaled = values * sizes + stack.pop_uniform(sizes)
    stack.push_bits(scaled, SCALE_BITS)
    stretched: np.ndarray = (scaled >> SCALE_BITS) + shifts
    return stretched


def shrink(
    values: np.ndarray, log_scales: np.ndarray, shifts: np.ndarray, stack: Stack
) -> np.ndarray:
    """Undo :func:`stretch`."""
    values = values - shifts
    check_range(values)
    sizes = _sizes(log_scales)
    rest = stack.pop_bits(len(values), SCALE_BITS)
    shrunk, place = np.divmod((values << SCALE_BITS) + rest, sizes)
    stack.push_uniform(place, sizes)
    return shrunk


def _sizes(log_scales: np.ndarray) -> np.ndarray:
    sizes = np.rint(np.exp(np.minimum(log_scales, 30.0)) * 2**SCALE_BITS)
    integers: np.ndarray = np.clip(sizes, 2, MAX_SIZE).astype(np.int64)
    return integers
