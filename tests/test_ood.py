"""The verdict: its arithmetic, and the promise that calibration makes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.ood import Calibration, CalibrationError


def calibration(seed: int = 0, n: int = 999) -> Calibration:
    rng = np.random.default_rng(seed)
    return Calibration.fit(rng.normal(4, 0.7, 500), rng.normal(4, 0.7, n))


def test_p_value_counts_the_calibration_scores() -> None:
    fitted = calibration()
    reference = fitted.scores(fitted.bpd)
    for bpd in (1.0, 3.9, 4.0, 5.5, 9.0):
        (verdict,) = fitted.verdicts(np.array([bpd]))
        expected = (1 + int((reference >= fitted.scores(np.array([bpd]))[0]).sum())) / 1000
        assert verdict.p_value == expected


def test_both_tails_are_strange() -> None:
    low, middle, high = calibration().verdicts(np.array([0.5, 4.0, 8.0]))
    assert low.p_value == high.p_value == 0.001
    assert middle.p_value > 0.5 and middle.ood_score < low.ood_score


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.05, 0.2]), st.sampled_from(["normal", "gamma", "ties"]))
def test_false_alarms_come_at_the_rate_that_was_chosen(seed: int, alpha: float, law: str) -> None:
    """Whatever the law: the realised rate, given the calibration, is Beta-distributed about alpha or below."""
    rng = np.random.default_rng(seed)
    draw = {"normal": lambda n: rng.normal(4, 1, n), "gamma": lambda n: rng.gamma(2.0, 1.0, n),
            "ties": lambda n: np.round(rng.normal(4, 1, n), 1)}[law]
    n = 2000
    fitted = Calibration.fit(draw(500), draw(n))
    p = np.array([v.p_value for v in fitted.verdicts(draw(20_000))])
    k = np.floor(alpha * (n + 1))
    spread = np.sqrt(k * (n + 1 - k) / ((n + 1) ** 2 * (n + 2)) + alpha / 20_000)
    assert (p <= alpha).mean() < alpha + 5 * spread
    if law != "ties":
        assert (p <= alpha).mean() > alpha - 5 * spread


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20))
def test_a_stranger_image_has_no_larger_p_value(values: list[float]) -> None:
    verdicts = calibration().verdicts(np.array(values))
    ordered = sorted(verdicts, key=lambda v: v.ood_score)
    assert all(a.p_value >= b.p_value for a, b in zip(ordered, ordered[1:], strict=False))


def test_file_round_trip(tmp_path) -> None:
    fitted = calibration()
    path = tmp_path / "calibration.npz"
    path.write_bytes(fitted.to_bytes())
    again = Calibration.load(path)
    assert again.verdicts(np.array([3.3])) == fitted.verdicts(np.array([3.3]))
    path.write_bytes(b"not an archive")
    with pytest.raises(CalibrationError, match="is no calibration"):
        Calibration.load(path)


@pytest.mark.parametrize("fit, cal, message", [
    (np.arange(10.0), np.arange(200.0), "fitting needs at least 20 images, got 10"),
    (np.arange(200.0), np.arange(5.0), "calibration needs at least 20 images, got 5"),
    (np.full(200, np.nan), np.arange(200.0), "200 scores are not finite"),
    (np.ones(200), np.arange(200.0), "do not vary"),
])
def test_what_cannot_be_calibrated(fit: np.ndarray, cal: np.ndarray, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Calibration.fit(fit, cal)
