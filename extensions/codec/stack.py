"""A stack of bits: symbols are pushed and popped with a distribution, last in, first out.

Popping a symbol with a distribution draws from it, with the bits that are on the stack as the
source of randomness, and pushing that symbol puts the same bits back. The coder is ``constriction``
(asymmetric numeral systems; Duda, "Asymmetric numeral systems", 2013). Its errors of invalid
parameters would end the process, so parameters are checked here.
"""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np

from extensions.codec.errors import Damaged, NotCoded

_uniform: Any = constriction.stream.model.Uniform()
_bits: list[Any] = [None, *(constriction.stream.model.Uniform(2**n) for n in range(1, 17))]
MAX_SIZE = 2**24 - 1  # of the alphabet of a uniform distribution
# A Gaussian's symbols are bins of 1/16 to 1/8 of its standard deviation, or of 1 where that is
# smaller than 8; the value's place in its bin is uniform.
_BIN_BITS = 3
# Each symbol has a probability of at least 2**-24. Where symbols are drawn, few of them may lie in
# the tails, which would be drawn too often; where given values are stored, none may be missing.
_DRAWN = 128
_STORED = 1024
_drawn: Any = constriction.stream.model.QuantizedGaussian(-_DRAWN, _DRAWN)
_stored: Any = constriction.stream.model.QuantizedGaussian(-_STORED, _STORED)
_EXCESS_BITS = 16
_EXCESS_DIGITS = 3
_MAX_VALUE = 2.0**40


class Stack:
    """A stack of bits.

    Args:
        words: uint32, the content to start with: any bits, or what :meth:`finish` returned.
        sealed: whether these are any bits, and not the result of :meth:`finish`.

    Attributes:
        low: the smallest number of words that the stack ever had.
    """

    def __init__(self, words: np.ndarray, sealed: bool) -> None:
        words = np.ascontiguousarray(words, np.uint32)
        if not sealed and (not len(words) or not words[-1]):
            raise Damaged("the coded bits end with a zero")
        stack = constriction.stream.stack
        self._coder = stack.AnsCoder(words, seal=True) if sealed else stack.AnsCoder(words)
        self.low = len(words)

    @property
    def bits(self) -> int:
        """How many bits are on the stack."""
        return int(self._coder.num_valid_bits())

    def copy(self) -> Stack:
        """A stack with the same content."""
        other = Stack.__new__(Stack)
        other._coder = self._coder.clone()
        other.low = self.low
        return other

    def finish(self) -> np.ndarray:
        """The content, uint32, for ``Stack(words, sealed=False)``."""
        words: np.ndarray = self._coder.get_compressed()
        return words

    def unseal(self) -> np.ndarray:
        """The bits that a sealed stack started with, once all else has been popped.

        Raises:
            Damaged: something else is on the stack.
        """
        try:
            words: np.ndarray = self._coder.get_compressed(unseal=True)
        except ValueError as error:
            raise Damaged("the coded bits do not end where they should") from error
        return words

    def pop_uniform(self, sizes: np.ndarray) -> np.ndarray:
        """Draw from the integers below each of ``sizes``, which are at least 2; int64."""
        _check_sizes(sizes)
        values = self._coder.decode(_uniform, sizes.astype(np.int32))
        self.low = min(self.low, self._coder.num_words())
        return np.asarray(values, np.int64)

    def push_uniform(self, values: np.ndarray, sizes: np.ndarray) -> None:
        """Put values back that :meth:`pop_uniform` gave."""
        _check_sizes(sizes)
        if len(values) and ((values < 0) | (values >= sizes)).any():
            raise Damaged("a value is outside its range")
        self._coder.encode_reverse(values.astype(np.int32), _uniform, sizes.astype(np.int32))

    def pop_bits(self, count: int, bits: int) -> np.ndarray:
        """Draw ``count`` integers below ``2**bits``; int64."""
        values = self._coder.decode(_bits[bits], count)
        self.low = min(self.low, self._coder.num_words())
        return np.asarray(values, np.int64)

    def push_bits(self, values: np.ndarray, bits: int) -> None:
        """Put the lowest ``bits`` of values that :meth:`pop_bits` gave back."""
        self._coder.encode_reverse((values & (2**bits - 1)).astype(np.int32), _bits[bits])

    def draw_gaussian(self, means: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Draw integers from Gaussians; all arrays ``(n,)``, in units of the integers' grid."""
        bins = _Bins(means, scales)
        symbols = self._coder.decode(_drawn, bins.means, bins.scales)
        return bins.join(np.asarray(symbols, np.int64), self._pop_places(bins))

    def undraw_gaussian(self, values: np.ndarray, means: np.ndarray, scales: np.ndarray) -> None:
        """Put values back that :meth:`draw_gaussian` gave."""
        bins = _Bins(means, scales)
        symbols, places = bins.split(values)
        if np.abs(symbols).max(initial=0) > _DRAWN:
            raise Damaged("a latent was not drawn from its posterior")
        self._push_places(places, bins)
        self._coder.encode_reverse(symbols.astype(np.int32), _drawn, bins.means, bins.scales)

    def push_gaussian(self, values: np.ndarray, means: np.ndarray, scales: np.ndarray) -> None:
        """Store any integers, which are short if the Gaussians expect them."""
        bins = _Bins(means, scales)
        symbols, places = bins.split(values)
        self._push_places(places, bins)
        # The outermost symbols stand for all values beyond; how far beyond follows by itself.
        excess = np.abs(symbols) - _STORED
        excess = excess[excess >= 0]
        for digit in range(_EXCESS_DIGITS):
            self.push_bits(excess >> (_EXCESS_BITS * digit), _EXCESS_BITS)
        symbols = np.clip(symbols, -_STORED, _STORED).astype(np.int32)
        self._coder.encode_reverse(symbols, _stored, bins.means, bins.scales)

    def pop_gaussian(self, means: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """The integers that :meth:`push_gaussian` stored."""
        bins = _Bins(means, scales)
        symbols = np.asarray(self._coder.decode(_stored, bins.means, bins.scales), np.int64)
        outermost = np.abs(symbols) == _STORED
        excess = np.zeros(int(outermost.sum()), np.int64)
        for _ in range(_EXCESS_DIGITS):
            excess = (excess << _EXCESS_BITS) | self.pop_bits(len(excess), _EXCESS_BITS)
        symbols[outermost] += np.sign(symbols[outermost]) * excess
        return bins.join(symbols, self._pop_places(bins))

    def _pop_places(self, bins: _Bins) -> np.ndarray:
        places = np.zeros(len(bins.widths), np.int64)
        places[bins.wide] = self.pop_uniform(bins.widths[bins.wide])
        return places

    def _push_places(self, places: np.ndarray, bins: _Bins) -> None:
        self.push_uniform(places[bins.wide], bins.widths[bins.wide])


class _Bins:
    """The bins of Gaussians on a grid of integers, whose widths are powers of two."""

    def __init__(self, means: np.ndarray, scales: np.ndarray) -> None:
        # Comparisons with NaN are false.
        valid = (np.abs(means) < _MAX_VALUE) & (scales > 2.0**-20) & (scales < _MAX_VALUE)
        if not valid.all():
            raise NotCoded("the mean or the scale of a Gaussian is out of range")
        exponents = np.frexp(scales)[1] - 1 - _BIN_BITS
        self._exponents = np.clip(exponents, 0, 23).astype(np.int64)
        self.widths = np.int64(1) << self._exponents
        self.wide = self.widths > 1
        self._centres = np.rint(means).astype(np.int64)
        self.means = (means - self._centres) / self.widths
        self.scales = scales / self.widths

    def split(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Symbols, and places within their bins."""
        shifted = values - self._centres + (self.widths >> 1)
        symbols = shifted >> self._exponents
        return symbols, shifted - (symbols << self._exponents)

    def join(self, symbols: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The values of symbols and places."""
        limit = np.int64(2**62) >> self._exponents
        if (np.abs(symbols) >= limit).any():
            raise Damaged("a value is out of range")
        joined: np.ndarray = (
            (symbols << self._exponents) + places - (self.widths >> 1) + self._centres
        )
        return joined


def _check_sizes(sizes: np.ndarray) -> None:
    if len(sizes) and not (sizes.min() >= 2 and sizes.max() <= MAX_SIZE):
        raise NotCoded("the range of a value is out of range")
