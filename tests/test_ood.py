"""The verdict: its arithmetic, and the guarantees of the calibration."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from export.gate.density_fit import MAX_COMPONENTS, fit_calibration
from serving.verdict.calibration import CalibrationError
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.conformal import benjamini_hochberg, conformal_p_values, simes
from serving.verdict.density import FARTHEST, NormalScores
from serving.verdict.false_alarms import false_alarm_band, flagging_rank

NAMES = ("bpd", "complexity", "pixel_mean_0", "residual_rows")
LAWS = {
    "normal": lambda rng, n: rng.normal(4, 1, n),
    "gamma": lambda rng, n: rng.gamma(2.0, 1.0, n),
    "ties": lambda rng, n: np.round(rng.normal(4, 1, n), 1),
}


def draw(rng, n, law="normal", shift=0.0):
    """Draw dependent statistics from one distribution."""
    common = rng.normal(0, 1, n)
    return {
        name: (LAWS[law](rng, n) + 0.7 * common * (law != "ties") + shift).astype(np.float32)
        for name in NAMES
    }


def calibration(seed=0, n=999, law="normal"):
    rng = np.random.default_rng(seed)
    return fit_calibration(draw(rng, 500, law), draw(rng, n, law))


def p_values(fitted, statistics):
    return np.array([v.p_value for v in fitted.verdicts(statistics)])


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=40),
    st.lists(st.integers(-1, 13), min_size=1, max_size=10),
)
def test_p_values_count_the_calibration_scores(reference, scores):
    """Ties count too; p-values are never 0 and never above 1."""
    found = conformal_p_values(np.sort(np.array(reference, float)), np.array(scores, float))
    for p, score in zip(found, scores, strict=True):
        assert p == (1 + sum(r >= score for r in reference)) / (len(reference) + 1)
        assert 0 < p <= 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.05, 0.2]), st.sampled_from(sorted(LAWS)))
def test_false_alarms_have_the_chosen_rate(seed, alpha, law):
    """For any distribution the realised rate of a calibration follows Beta(k, n + 1 - k).

    With ties it is lower.
    """
    rng = np.random.default_rng(seed)
    n, m = 1000, 4000
    fitted = fit_calibration(draw(rng, 300, law), draw(rng, n, law))
    flagged = int((p_values(fitted, draw(rng, m, law)) <= alpha).sum())
    k = int(np.floor(alpha * (n + 1)))
    low, high = stats.betabinom.ppf([1e-6, 1 - 1e-6], m, k, n + 1 - k)
    assert flagged <= high
    if law != "ties":
        assert flagged >= low


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(sorted(LAWS)))
def test_randomised_p_values_are_uniform(seed, law):
    rng = np.random.default_rng(seed)
    n, m = 2000, 1000
    fitted = fit_calibration(draw(rng, 300, law), draw(rng, n, law))
    values = np.array(
        [rng.uniform(v.beyond, v.p_value) for v in fitted.verdicts(draw(rng, m, law))]
    )
    # The calibration images are a sample, too: Kolmogorov and Smirnov's test of two samples.
    distance = stats.kstest(values, "uniform").statistic
    assert stats.kstwobign.sf(distance * np.sqrt(n * m / (n + m))) > 1e-6


def test_a_picture_that_calibrates_keeps_its_rank_on_another_processor():
    """There its score may differ in the last bits, upwards or downwards."""
    fitted, images = calibration(n=20), draw(np.random.default_rng(1), 1)
    (score,) = fitted.scores_of(images)
    scores = np.sort([*range(-900, -820), *[score] * 20])
    for other in (score, np.nextafter(score, np.inf), np.nextafter(score, -np.inf)):
        assert conformal_p_values(scores, np.array([other])) == 21 / 101
    (verdict,) = dataclasses.replace(fitted, scores=scores).verdicts(images)
    assert (verdict.p_value, verdict.beyond) == (21 / 101, 0)


def test_the_band_of_a_picture_that_repeats_begins_at_zero():
    """At the threshold none of equal scores is rejected: the rate may be any lower one."""
    alone = dataclasses.replace(calibration(n=20), scores=np.arange(999.0))
    assert alone.false_alarm_rate(0.01) == 0.01
    assert alone.false_alarm_band(0.01, tested=500) == false_alarm_band(999, 0.01, tested=500)
    repeated = dataclasses.replace(alone, scores=np.sort([*range(969), *[2000.0] * 30]))
    assert repeated.false_alarm_rate(0.01) == 0.001
    low, high = false_alarm_band(999, 0.01)
    assert low > 0 and repeated.false_alarm_band(0.01) == (0, high)
    assert repeated.false_alarm_band(0.1) == false_alarm_band(999, 0.1)
    few = dataclasses.replace(alone, scores=np.arange(50.0))
    assert few.false_alarm_rate(0.01) == 0 and few.false_alarm_band(0.01) == (0, 0)
    assert few.false_alarm_rate(1.0) == 1


def test_both_tails_are_flagged_and_explained():
    fitted = calibration()
    typical = {name: np.array([4.0], np.float32) for name in NAMES}
    for shift in (-8.0, 8.0):
        for name in NAMES:
            unusual = {**typical, name: np.array([4.0 + shift], np.float32)}
            (verdict,) = fitted.verdicts(unusual)
            assert verdict.p_value == pytest.approx(0.001)
            assert verdict.explain[0].statistic == name and verdict.explain[
                0
            ].p_value == pytest.approx(0.002)
            assert [u.p_value for u in verdict.explain] == sorted(
                u.p_value for u in verdict.explain
            )
    (verdict,) = fitted.verdicts(typical)
    assert verdict.p_value > 0.5 and {u.statistic for u in verdict.explain} == set(NAMES)


def test_unlikely_combinations_of_likely_statistics_are_flagged():
    """The density detects what no single statistic can."""
    rng = np.random.default_rng(1)

    def twins(n, sign=1.0):
        first = rng.normal(0, 1, n)
        return {
            "bpd": first.astype(np.float32),
            "complexity": (sign * first + rng.normal(0, 0.1, n)).astype(np.float32),
        }

    fitted = fit_calibration(
        {**twins(500), "pixel_mean_0": rng.normal(size=500).astype(np.float32)},
        {**twins(999), "pixel_mean_0": rng.normal(size=999).astype(np.float32)},
    )
    unusual = {
        "bpd": np.array([1.0], np.float32),
        "complexity": np.array([-1.0], np.float32),
        "pixel_mean_0": np.zeros(1, np.float32),
    }
    (verdict,) = fitted.verdicts(unusual)
    assert verdict.p_value == pytest.approx(0.001) and min(u.p_value for u in verdict.explain) > 0.1


@given(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=30))
def test_normal_scores_keep_the_order(values):
    fitted = NormalScores.fit(np.random.default_rng(0).normal(0, 3, (400, 1)).astype(np.float32))
    scores = fitted(np.sort(np.array(values, np.float32))[:, None])[:, 0]
    assert (np.diff(scores) >= 0).all()


def test_normal_scores_are_normal_and_equal_values_share_theirs():
    rng = np.random.default_rng(0)
    rows = np.stack(
        [rng.gamma(2, 1, 3000), np.where(rng.random(3000) < 0.6, 0.0, rng.random(3000))], axis=1
    )
    fitted = NormalScores.fit(rows.astype(np.float32))
    scores = fitted(rows.astype(np.float32))
    assert stats.kstest(scores[:, 0], "norm").pvalue > 0.01
    middle = fitted(np.zeros((1, 2), np.float32))[0, 1]
    assert stats.norm.cdf(middle) == pytest.approx(0.3, abs=0.02)
    assert fitted(np.full((1, 2), 1e9, np.float32)).min() > FARTHEST  # linear beyond the grid


@given(st.lists(st.floats(0.0005, 1), min_size=1, max_size=30), st.floats(0.01, 0.5))
def test_benjamini_hochberg_and_simes(values, fdr):
    m, ordered = len(values), sorted(values)
    passing = [i for i in range(1, m + 1) if ordered[i - 1] * m <= fdr * i * (1 + 1e-9)]
    count = max(passing, default=0)
    found = benjamini_hochberg(values, fdr)
    assert sum(found) == sum(v <= (ordered[count - 1] if count else -1) for v in values)
    group = simes(values)
    assert group == pytest.approx(min(1, *(m * p / i for i, p in enumerate(ordered, 1))))
    assert (group <= fdr) == any(found) or abs(group - fdr) < 1e-9
    assert min(values) <= group + 1e-12


def test_rounding_hides_no_discoveries():
    """All of 29 images have the smallest p-value of 99 calibration images, which is the rate."""
    assert benjamini_hochberg([1 / 100] * 29, 0.01) == [True] * 29


def test_the_band_of_false_alarms():
    # The published value for n = 1000.
    assert false_alarm_band(999, 0.01) == pytest.approx((0.0048, 0.0170), abs=2e-4)
    low, high = false_alarm_band(3000, 0.01)
    assert low < 0.01 < high
    assert false_alarm_band(50, 0.01) == (0.0, 0.0)
    few, many = false_alarm_band(3000, 0.01, tested=200), false_alarm_band(3000, 0.01, tested=10**6)
    assert few[0] == 0.0 and few[1] > high and many == pytest.approx((low, high), abs=5e-4)
    assert false_alarm_band(9, 1.0) == (1.0, 1.0)  # everything is rejected


@pytest.mark.parametrize("n", [20, 199, 3000, 12_000])
@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.01])
def test_the_band_is_that_of_scipy(n, alpha):
    k = flagging_rank(n, alpha)
    if k:
        tails = [0.025, 0.975]
        assert false_alarm_band(n, alpha) == pytest.approx(
            stats.beta.ppf(tails, k, n + 1 - k), rel=1e-6, abs=1e-12
        )
        for count in (1, 200, 5000):
            assert np.multiply(false_alarm_band(n, alpha, tested=count), count) == pytest.approx(
                stats.betabinom.ppf(tails, count, k, n + 1 - k)
            )


def test_more_images_make_a_finer_density():
    rng = np.random.default_rng(0)
    sizes = [
        len(fit_calibration(draw(rng, n), draw(rng, 50)).mixture.means) for n in (30, 600, 4000)
    ]
    assert sizes == [1, 2, MAX_COMPONENTS]


def test_constant_statistics_are_left_out():
    rng = np.random.default_rng(0)
    constant = {**draw(rng, 100), "residual_rows": np.zeros(100, np.float32)}
    fitted = fit_calibration(
        constant, {**draw(rng, 100), "residual_rows": np.zeros(100, np.float32)}
    )
    assert fitted.names == NAMES[:3]


def test_a_statistic_that_is_no_longer_computed_is_named():
    fitted = calibration()
    fitted.check_statistics([*NAMES, "another"])
    with pytest.raises(
        CalibrationError, match="does not compute: complexity, residual_rows; ade calibrate"
    ):
        fitted.check_statistics(["bpd", "pixel_mean_0"])


def test_file_round_trip(tmp_path):
    """For a calibration of each kind, for a single one, and for one that serves both."""
    exact, resized, either = (calibration(seed) for seed in range(3))
    either = dataclasses.replace(either, resize="fit")
    path = tmp_path / "calibration.npz"
    some = draw(np.random.default_rng(3), 5)
    for kept in (
        CalibrationPair(exact, resized),
        CalibrationPair(exact, None),
        CalibrationPair(either, either),
    ):
        path.write_bytes(kept.to_bytes())
        again = CalibrationPair.load(path)
        for before, after in ((kept.exact, again.exact), (kept.resized, again.resized)):
            assert (before is None) == (after is None)
            if before is not None and after is not None:
                assert after.verdicts(some) == before.verdicts(some)
                assert after.resize == before.resize and after.summary() == before.summary()
    path.write_bytes(b"not an archive")
    with pytest.raises(CalibrationError, match="is not a calibration"):
        CalibrationPair.load(path)


def test_another_estimator_is_refused():
    """Verdicts use the ELBO, with which the scores of another estimator cannot be compared."""
    with pytest.raises(CalibrationError, match="estimator must be elbo, got 'iwae-8'"):
        dataclasses.replace(calibration(), estimator="iwae-8").check_values()


def test_a_file_of_earlier_versions(tmp_path):
    """Older files have one calibration, with a flag whether it is for resized images too."""
    path = tmp_path / "calibration.npz"
    for resize in (None, "fit"):
        old = dataclasses.replace(calibration(), resize=resize)
        np.savez_compressed(path, **old.arrays())
        again = CalibrationPair.load(path)
        assert again.exact is not None and again.of(False) is again.exact
        assert again.of(True) is (again.exact if resize else None)


@pytest.mark.parametrize(
    "fit, cal, message",
    [
        (
            10,
            200,
            "fitting the density needs at least 20 images, got 10 .ade calibrate takes two fifths",
        ),
        (200, 5, "setting the false-alarm rate needs at least 20 images, got 5"),
    ],
)
def test_too_few_images(fit, cal, message):
    rng = np.random.default_rng(0)
    with pytest.raises(CalibrationError, match=message):
        fit_calibration(draw(rng, fit), draw(rng, cal))


def test_bundles_that_cannot_be_calibrated():
    rng = np.random.default_rng(0)
    bad = draw(rng, 100)
    bad["complexity"][3:5] = np.nan
    with pytest.raises(
        CalibrationError, match="fitting: the statistics of 2 images are not finite"
    ):
        fit_calibration(bad, draw(rng, 100))
    with pytest.raises(CalibrationError, match="do not vary"):
        fit_calibration({name: np.ones(100, np.float32) for name in NAMES}, draw(rng, 100))
