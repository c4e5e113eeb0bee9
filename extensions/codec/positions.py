"""Draws values' positions in the bins of their pixels as a model's dequantiser distributes them.

The coder may draw positions in any way that both sides know; it gets the drawn bits back. Uniform
draws (:class:`extensions.codec.lattice.Bins`) would cost more where the model expects other
positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from extensions.codec.lattice import Bins
from extensions.codec.stack import Stack

TOTAL = 2**18  # of the frequencies in a bin; larger numbers would make uniform draws uneven
LEAST = 2  # frequency of a place

Run = Callable[[str, dict[str, np.ndarray]], list[np.ndarray]]


class LearnedBins:
    """Bins of which places are drawn with the networks of a dequantiser.

    The distribution of a place is that of :class:`ade_model.dequantizer.Dequantizer`, whose
    positions have a logistic distribution in their logits, mixed with little of the uniform one.

    Args:
        bins: of the pixels.
        order: the corners of 2x2 patches in the order in which they are transformed.
        run: evaluates a graph of the codec by its name.
    """

    def __init__(self, bins: Bins, order: list[int], run: Run) -> None:
        self._bins = bins
        self._sizes = np.diff(bins.edges)
        self._order = order
        self._run = run

    def enter(self, pixels: np.ndarray, stack: Stack) -> np.ndarray:
        """Draw a place in the bin of each of ``pixels``, ``(C, H, W)``."""
        places = np.zeros(pixels.shape, np.int64)
        for corner, channel, location, scale in self._steps(pixels, places):
            sizes = self._sizes[_corner(pixels, corner)[channel].ravel()]
            drawn = _draw(sizes, location, scale, stack)
            mine = _corner(places, corner)[channel]
            mine[...] = drawn.reshape(mine.shape)
        entered: np.ndarray = self._bins.edges[pixels] + places
        return entered

    def leave(self, values: np.ndarray, stack: Stack) -> np.ndarray:
        """The pixels, uint8; puts the places in their bins back.

        Raises:
            Damaged: a value is in no bin.
        """
        pixels, places = self._bins.split(values)
        for corner, channel, location, scale in reversed(list(self._steps(pixels, places))):
            sizes = self._sizes[_corner(pixels, corner)[channel].ravel()]
            _undraw(_corner(places, corner)[channel].ravel(), sizes, location, scale, stack)
        return pixels.astype(np.uint8)

    def _steps(
        self, pixels: np.ndarray, places: np.ndarray
    ) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Each step's corner, channel, and location and scale of the logits.

        A step uses the places of those before it, which the caller may enter meanwhile.
        """
        (context,) = self._run("codec-context", {"pixels": pixels[None].astype(np.float32)})
        known: list[np.ndarray] = []
        for i, corner in enumerate(self._order):
            inputs = {"context": context}
            if known:
                inputs["known"] = np.concatenate(known)[None].astype(np.float32)
            log_scale, shift, mixing = (
                result[0].reshape(result.shape[1], -1).astype(np.float64)
                for result in self._run(f"codec-corner-{i}", inputs)
            )
            sizes = self._sizes[_corner(pixels, corner)]
            logits = np.zeros(sizes.shape)
            factor = 0
            for channel in range(len(pixels)):
                location = shift[channel]
                for other in range(channel):
                    location = location + mixing[factor] * logits[other].ravel()
                    factor += 1
                yield corner, channel, location, np.exp(log_scale[channel])
                place = _corner(places, corner)[channel]
                logits[channel] = _logit((place + 0.5) / sizes[channel])
            known.append(logits)


def _corner(values: np.ndarray, corner: int) -> np.ndarray:
    """A view of one corner of each 2x2 patch."""
    return values[:, corner // 2 :: 2, corner % 2 :: 2]


def _draw(sizes: np.ndarray, locations: np.ndarray, scales: np.ndarray, stack: Stack) -> np.ndarray:
    drawn = stack.pop_uniform(np.full(len(sizes), TOTAL))
    # The last place whose first number is not above the drawn one.
    low, high = np.zeros(len(sizes), np.int64), sizes - 1
    while (low < high).any():
        middle = (low + high + 1) >> 1
        is_above = _first(middle, sizes, locations, scales) > drawn
        low, high = np.where(is_above, low, middle), np.where(is_above, middle - 1, high)
    first = _first(low, sizes, locations, scales)
    stack.push_uniform(drawn - first, _first(low + 1, sizes, locations, scales) - first)
    return low


def _undraw(
    places: np.ndarray,
    sizes: np.ndarray,
    locations: np.ndarray,
    scales: np.ndarray,
    stack: Stack,
) -> None:
    first = _first(places, sizes, locations, scales)
    within = stack.pop_uniform(_first(places + 1, sizes, locations, scales) - first)
    stack.push_uniform(first + within, np.full(len(sizes), TOTAL))


def _first(
    places: np.ndarray, sizes: np.ndarray, locations: np.ndarray, scales: np.ndarray
) -> np.ndarray:
    """The first of a place's numbers below ``TOTAL``; of the place after the last, ``TOTAL``."""
    below = 1 / (1 + np.exp(-(_logit(places / sizes) - locations) / scales))
    numbers = np.rint((TOTAL - LEAST * sizes) * below).astype(np.int64)
    first: np.ndarray = LEAST * places + numbers
    return first


def _logit(positions: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # the edges of a bin are infinite, as they should be
        logits: np.ndarray = np.log(positions) - np.log1p(-positions)
    return logits
