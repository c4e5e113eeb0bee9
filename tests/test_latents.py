"""Interpolation in the noise: end points, norms, and the levels that stay fixed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.latents import between, coarsest, exchanged, from_coarsest, with_level

SHAPES = [(4, 2, 2), (3, 4, 4), (2, 8, 8)]


def noise(seed, n=1):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, *shape)).astype(np.float32) for shape in SHAPES]


@given(st.integers(0, 2**32), st.integers(0, 2**32), st.integers(3, 16))
def test_the_path_has_its_end_points_and_keeps_the_norm(first, last, steps):
    a, b = noise(first), noise(last)
    for way, start, end in zip(between(a, b, steps), a, b, strict=True):
        assert way.shape == (steps, *start.shape[1:]) and way.dtype == np.float32
        assert np.allclose(way[0], start[0], atol=1e-5) and np.allclose(way[-1], end[0], atol=1e-5)
        lengths = [np.linalg.norm(step) for step in way]
        low, high = sorted((np.linalg.norm(start), np.linalg.norm(end)))
        assert min(lengths) > 0.85 * low and max(lengths) < 1.15 * high


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0])
def test_end_points_on_one_line(factor):
    a = noise(3)
    for way in between(a, [np.float32(factor) * level for level in a], 5):
        assert np.isfinite(way).all()


def test_exchanged_levels():
    a, b = noise(1), noise(2)
    made = exchanged(a, b)
    for level in range(3):
        for kept in range(4):
            assert np.array_equal(made[level][kept], (a if level < kept else b)[level][0])


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_one_level_changes_and_the_others_stay(changed):
    own, others = noise(1), noise(2, 5)
    for level, made in enumerate(with_level(own, others, changed)):
        assert np.array_equal(
            made, others[level] if level == changed else np.repeat(own[level], 5, axis=0)
        )


def test_coarsest():
    for kept in range(4):
        for level, made in enumerate(coarsest(noise(1), kept)):
            assert np.array_equal(made, noise(1)[level]) if level < kept else not made.any()


def test_from_coarsest():
    for level, made in enumerate(from_coarsest(noise(1))):
        assert [row.any() for row in made] == [kept > level for kept in (1, 2, 3)]
        assert all(np.array_equal(row, noise(1)[level][0]) for row in made if row.any())
