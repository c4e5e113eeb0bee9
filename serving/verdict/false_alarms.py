"""The false alarms to expect of a calibration, as exact bands; needs only NumPy."""

from __future__ import annotations

import math

import numpy as np

BISECTIONS = 60  # halve the interval [0, 1] to less than a float's precision


def flagging_rank(n: int, alpha: float) -> int:
    """Number of the n + 1 ranks of an image among n calibration images that alpha rejects.

    The expected false-alarm rate is this number divided by n + 1. It is 0 if n is too small to
    reject anything.
    """
    return math.floor(alpha * (n + 1) + 1e-9)


def false_alarm_band(
    n: int, alpha: float, level: float = 0.95, tested: int | None = None
) -> tuple[float, float]:
    """The band of the realised false-alarm rate of a calibration.

    Its ends are quantiles of a Beta(k, n + 1 - k) distribution, where k is :func:`flagging_rank`.
    The share among ``tested`` images varies more: their number follows the Beta-Binomial
    distribution. Vovk, "Conditional validity of inductive conformal predictors", 2012.

    Args:
        n: number of calibration images.
        alpha: the requested false-alarm rate.
        level: probability of the band.
        tested: number of in-distribution images whose rejected share is to be judged; ``None``
            for the rate itself.

    Returns:
        The two ends of the band; zeros if n is too small to reject anything.
    """
    k = flagging_rank(n, alpha)
    if k == 0:
        return 0.0, 0.0
    if k > n:
        return 1.0, 1.0
    tail = (1 - level) / 2
    if tested:
        low, high = _beta_binomial_quantiles(tested, k, n + 1 - k, (tail, 1 - tail))
        return low / tested, high / tested
    return _beta_quantile(n, k, tail), _beta_quantile(n, k, 1 - tail)


def _beta_quantile(n: int, k: int, probability: float) -> float:
    """Of Beta(k, n + 1 - k): it is at most x exactly if k or more of n uniform numbers are."""
    counts = np.arange(k)
    log_ways = np.concatenate([[0.0], np.cumsum(np.log((n - counts[:-1]) / (counts[:-1] + 1)))])
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        x = (low + high) / 2
        below = np.exp(log_ways + counts * math.log(x) + (n - counts) * math.log1p(-x)).sum()
        low, high = (x, high) if 1 - below < probability else (low, x)
    return (low + high) / 2


def _beta_binomial_quantiles(
    count: int, a: int, b: int, probabilities: tuple[float, float]
) -> tuple[int, int]:
    """The smallest numbers whose cumulative probability is at least each of two values."""
    x = np.arange(count, dtype=np.float64)
    ratios = np.log((count - x) * (a + x)) - np.log((x + 1) * (count - x - 1 + b))
    logs = np.concatenate([[0.0], np.cumsum(ratios)])
    weights = np.exp(logs - logs.max())
    low, high = np.searchsorted(np.cumsum(weights) / weights.sum(), probabilities)
    return int(low), int(min(high, count))
