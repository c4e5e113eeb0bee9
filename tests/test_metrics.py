"""Metrics against closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.metrics.features import FeatureError, ResNet20
from training.metrics.frechet import frechet_distance


def test_frechet_distance_of_independent_gaussians() -> None:
    rng = np.random.default_rng(0)
    scales_a, scales_b, shift = np.array([1.0, 2.0, 0.5]), np.array([2.0, 1.0, 0.5]), np.array([1.0, 0.0, -2.0])
    a, b = rng.normal(0, scales_a, (200_000, 3)), rng.normal(shift, scales_b, (200_000, 3))
    expected = np.square(shift).sum() + np.square(scales_a - scales_b).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.01)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_does_not_depend_on_the_basis() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, (500, 4)) * [1, 2, 3, 4], rng.normal(1, 2, (400, 4))
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="must be"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    with pytest.raises(FeatureError, match="does not hold a ResNet-20"):
        ResNet20(tmp_path / "w.npz")
