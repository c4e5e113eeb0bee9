"""Lossless coding in exact arithmetic, and on all images of models that are small enough."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest

pytest.importorskip("constriction")

import constriction

from extensions.codec import lattice, stack
from extensions.codec.image_coder import ImageCoder
from extensions.codec.lifting import COEFFICIENT_BITS, factorize
from extensions.codec.stack import Stack

Coder = constriction.stream.stack.AnsCoder
TOTAL = 2**24  # a table's probabilities are multiples of 1 / TOTAL


def encoded(symbol, start, model, parameters):
    """The state of a coder after one symbol, as one integer."""
    coder = Coder()
    coder.seek(0, start)
    coder.encode_reverse(np.array([symbol], np.int32), model, *parameters)
    position, state = coder.pos()
    assert position == 0
    return int(state)


def decoded(state, model, parameters):
    coder = Coder()
    coder.seek(0, state)
    return int(coder.decode(model, *parameters)[0])


def table(model, symbols, *values):
    """The probabilities of a family's member, measured from the states that the coder reaches.

    From the state ``s``, a symbol of the probability ``p / TOTAL`` whose table begins at ``c``
    leads to ``(s // p) * TOTAL + c + s % p``.
    """
    parameters = [np.array([value]) for value in values]
    start, position = 2**39 + 12345, 0
    probabilities = []
    for symbol in symbols:
        first = encoded(symbol, 0, model, parameters)
        assert first == position  # the tables of neighbours touch, and do not overlap
        quotient, low = divmod(encoded(symbol, start, model, parameters), TOTAL)
        size, remainder = divmod(start - (low - first), quotient)
        assert remainder == 0 and size > 0
        assert decoded(first, model, parameters) == symbol
        assert decoded(first + size - 1, model, parameters) == symbol
        probabilities.append(Fraction(size, TOTAL))
        position = first + size
    return probabilities


GAUSSIANS = [(0.0, 2.0**-19), (0.5, 0.3), (-0.5, 1.0), (0.25, 7.9), (0.0, 8.0), (-0.4, 15.99)]


@pytest.mark.parametrize(("mean", "scale"), GAUSSIANS)
@pytest.mark.parametrize(("family", "last"), [("_drawn", stack._DRAWN), ("_stored", stack._STORED)])
def test_a_gaussian_has_one_table_without_gaps(family, last, mean, scale):
    """Kraft's inequality with equality: no bits are lost, and every symbol can be stored."""
    model = getattr(stack, family)
    probabilities = table(model, range(-last, last + 1), mean, scale)
    assert sum(probabilities) == 1
    assert min(probabilities) >= Fraction(1, TOTAL)


@pytest.mark.parametrize("size", [2, 3, 100, 257, 4096])
def test_a_uniform_range_has_one_table_without_gaps(size):
    probabilities = table(stack._uniform, range(size), np.int32(size))
    assert sum(probabilities) == 1
    # Uneven by one part in TOTAL // size: a draw costs what it should.
    assert min(probabilities[:-1]) == max(probabilities[:-1]) == Fraction(TOTAL // size, TOTAL)
    assert 1 <= probabilities[-1] / probabilities[0] < 1 + Fraction(size * size, TOTAL)


def test_values_cost_their_information():
    """The size of many values is that of the exact product of their probabilities.

    A state of at least 2**32 is divided by at most 2**24, so the remainder makes a symbol up to
    0.006 bits shorter or longer, and mostly far less; by chance, so it does not add up.
    """
    mean, scale = 0.2, 11.0
    first = -stack._STORED
    probabilities = table(stack._stored, range(first, 1 - first), mean, scale)
    values = np.rint(mean + scale * np.random.default_rng(0).normal(size=3000)).astype(np.int64)
    values[:4] = [-300, 300, 1000, -1000]  # of the smallest probability
    likelihood = Fraction(1)
    coder = Stack(np.random.default_rng(1).integers(0, 2**32, 9, np.uint32), sealed=True)
    before = exact_bits(coder)
    coder.push_gaussian(values * 2, np.full(3000, 2 * mean), np.full(3000, 2 * scale))
    for value in values:
        likelihood *= probabilities[value - first] / 2  # a bin has two places
    information = bits(likelihood.denominator) - bits(likelihood.numerator)
    assert abs((exact_bits(coder) - before) / information - 1) < 1e-5


def bits(number):
    """The logarithm of a number that is too large for a float."""
    shift = max(0, number.bit_length() - 64)
    return shift + float(np.log2(number >> shift))


def exact_bits(coder):
    """The size of a stack, not rounded to whole bits."""
    words, state = coder._coder.pos()
    return 32 * words + bits(int(state))


@pytest.mark.parametrize("n", [1, 2, 3, 12, 24])
def test_a_rotation_is_exact_up_to_the_largest_values(n):
    """Against integers without limit: floats lose nothing, in whatever order they are added."""
    generator = np.random.default_rng(n)
    lifting = factorize(np.linalg.qr(generator.normal(size=(n, n)))[0])
    rotation = lattice.Rotation(lifting.signs, lifting.steps / 2.0**COEFFICIENT_BITS)
    largest = lattice.MAX_VALUE - 1
    x = generator.choice([largest, -largest, largest - 12345, 1, 0], (n, 4)).astype(np.int64)
    exact = (x * lifting.signs[:, None]).astype(object)
    for step in lifting.steps:
        added = step.astype(object) @ exact
        exact = exact + np.vectorize(lambda v: round(Fraction(int(v), 2**COEFFICIENT_BITS)))(added)
    assert np.array_equal(rotation.forward(x[:, None])[:, 0], exact.astype(np.int64))


def test_all_small_vectors_come_back_from_a_rotation():
    lifting = factorize(np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0])
    rotation = lattice.Rotation(lifting.signs, lifting.steps / 2.0**COEFFICIENT_BITS)
    x = np.array(list(product(range(-3, 4), repeat=4))).T[:, None]
    y = rotation.forward(x)
    assert np.array_equal(rotation.inverse(y), x)
    assert len(set(map(tuple, y[:, 0].T))) == 7**4


class _Recorded:
    """The stack of one stretching: gives the places that it is told, and keeps what is pushed."""

    def __init__(self, places):
        self.places = places
        self.pushed = np.zeros(0, np.int64)

    def pop_uniform(self, sizes):
        assert (self.places < sizes).all()
        return self.places

    def push_bits(self, values, bits):
        self.pushed = values & (2**bits - 1)


@pytest.mark.parametrize("size", [2, 3, 100, 4095, 4096, 4097, 20000])
def test_stretching_is_a_bijection(size):
    """Between values with one of ``size`` places and values with one of 4096: none is left out."""
    fine = 2**lattice.SCALE_BITS
    values, places = (a.ravel() for a in np.mgrid[-3:4, 0:size])
    recorded: Any = _Recorded(places)
    log_scales = np.full(len(values), np.log(size / fine))
    y = lattice.stretch(values, log_scales, np.full(len(values), 7), recorded)
    reached = (y - 7) * fine + recorded.pushed
    assert np.array_equal(np.sort(reached), np.arange(-3 * size, 4 * size))


class TinyModel:
    """A model of 2x2 images with four grey levels, with every kind of step.

    Its networks are functions of a few operations, in the form of the graphs of a bundle.
    """

    image_shape = (2, 2, 1)
    grid_bits, latent_bits = 10, 6

    def __init__(self, levels):
        self.levels = levels
        self.latent_shapes = [(2, 1, 1), (1, 2, 2)][:levels]
        self.bins = lattice.Bins(np.array([-2000, -700, 10, 650, 2100]))
        generator = np.random.default_rng(0)
        lifting = factorize(np.linalg.qr(generator.normal(size=(4, 4)))[0])
        self.rotations = {
            "r": lattice.Rotation(lifting.signs, lifting.steps / 2.0**COEFFICIENT_BITS)
        }
        by_channels = {"do": "couple", "graph": "codec-coupling-00", "first_pixel_kept": None}
        checkers = [{**by_channels, "first_pixel_kept": colour} for colour in (0, 1)]
        steps: list[dict[str, Any]] = [{"do": "rotate", "rotation": "r"}, by_channels]
        half = {"do": "on_half", "steps": [by_channels]}
        self.flow = [*checkers, {"do": "squeezed", "steps": [*steps, half]}]
        ones = np.ones((1, 2, 1, 1), np.float32)
        self.arrays = {
            "features": 0.3 * ones,
            "prior_mean": 0.1 * ones,
            "prior_log_scale": -0.2 * ones,
            "log_sigma": np.full((1, 2, 2), -0.1, np.float32),
        }

    def run(self, graph, inputs):
        flat = np.zeros((1, 1, 2, 2), np.float32)
        match graph:
            case "codec-coupling-00":
                kept = inputs["kept"]
                return [0.3 * np.tanh(kept + 0.2), 0.4 * np.tanh(2 * kept)]
            case "codec-encoder":
                mean = inputs["y"].mean()
                return [np.float32(mean) * np.ones((1, 2, 1, 1), np.float32), inputs["y"]]
            case "codec-posterior-0" | "codec-posterior-1":
                mean = 0.7 * inputs["prior_mean"] + 0.3 * inputs["encoded"]
                return [mean, inputs["prior_log_scale"] - 0.3]
            case "codec-stage-1":
                lowest = 0.2 * inputs["z"].sum() + flat
                return [inputs["features"], lowest, flat - 0.5]
            case _:
                return [0.5 * inputs["z"]]


ALL_IMAGES = np.array(list(product(range(4), repeat=4)), np.uint8).reshape(-1, 2, 2, 1)


@pytest.mark.parametrize("levels", [0, 2])
def test_all_images_of_a_tiny_model(levels):
    """Every image decodes, and all lengths together obey Kraft's inequality.

    One image can be short by luck, because of the bits that it pops; the mean of ``2**-length``
    over what it may pop is the probability that the model gives it. All images together have what
    the model does not give to values that are no image: 0.85 by a Monte Carlo estimate. With mean
    lengths the sum is smaller still (Jensen), so the images of any source are on average no
    shorter than its entropy (Shannon, 1948); 8 bits where all are equally likely.
    """
    model: Any = TinyModel(levels)
    coder = ImageCoder(model)
    generator = np.random.default_rng(levels)
    rounds = 4
    lengths = np.zeros((rounds, len(ALL_IMAGES)))
    for length in lengths:
        words = generator.integers(0, 2**32, 100, np.uint32)
        coded = Stack(words, sealed=True)
        order = generator.permutation(len(ALL_IMAGES))
        for i in order:
            before = exact_bits(coded)
            coder.encode(ALL_IMAGES[i], coded)
            length[i] = exact_bits(coded) - before
        back = Stack(coded.finish(), sealed=False)
        for i in order[::-1]:
            assert np.array_equal(coder.decode(back), ALL_IMAGES[i])
        assert np.array_equal(back.unseal(), words)
    assert 0.7 < np.sum(np.mean(2.0**-lengths, axis=0)) < 1
    assert 0.3 < np.sum(2.0 ** -lengths.mean(axis=0)) < 1
    assert lengths.mean() >= 8
