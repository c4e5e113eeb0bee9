"""The drift monitor: silent on a stream without a change, quick on one with."""

import numpy as np
import pytest
from scipy import stats

from serving.verdict.drift import MOST, WINDOW, DriftMonitor


def run(values):
    monitor = DriftMonitor()
    for value in values:
        monitor.update(float(value))
    return monitor


def delay(values, threshold, attribute):
    monitor = DriftMonitor()
    for i, value in enumerate(values):
        monitor.update(float(value))
        if getattr(monitor, attribute) > threshold:
            return i
    return None


def test_a_stream_without_a_change():
    rng = np.random.default_rng(0)
    monitor = run(rng.uniform(size=5000))
    assert monitor.images == 5000 and monitor.unusual < 8 and monitor.usual < 8
    assert monitor.distance() < 2


@pytest.mark.parametrize("shift, attribute", [(1.0, "unusual"), (-1.0, "usual")])
def test_a_shift_is_found_within_tens_of_images(shift, attribute):
    rng = np.random.default_rng(1)
    delays = [delay(stats.norm.sf(rng.normal(shift, 1, 500)), 8.0, attribute) for _ in range(20)]
    assert all(d is not None for d in delays) and 10 < np.mean(delays) < 25


def test_a_change_of_spread_is_found_by_the_window():
    rng = np.random.default_rng(2)
    monitor = run(stats.norm.sf(rng.normal(0, 0.4, WINDOW)))
    assert monitor.distance() > 2.5


def test_the_distance_is_that_of_kolmogorov_and_smirnov():
    values = np.random.default_rng(3).beta(2, 3, 200)
    expected = stats.kstest(values, "uniform").statistic * np.sqrt(200)
    assert run(values).distance() == pytest.approx(expected)
    assert DriftMonitor().distance() == 0


def test_extremes_are_finite():
    assert np.isfinite(run(np.array([0.0, 1.0, 1e-300])).unusual)


def test_an_alarm_is_over_soon_after_its_cause():
    for cause, name in ((1e-4, "unusual"), (1 - 1e-4, "usual")):
        monitor = run(np.full(1000, cause))
        assert getattr(monitor, name) == MOST
        for value in np.random.default_rng(4).uniform(size=80):
            monitor.update(float(value))
        assert getattr(monitor, name) < 8
