"""Conformal p-values, and what follows from those of several images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Nats; closer scores count as equal. The score of one image may differ by less between processors
# and runtimes, and a picture that calibrates must keep its rank on all of them.
SLACK = 0.01


def conformal_p_values(reference: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Conformal p-values, ``(1 + #{reference >= score - SLACK}) / (n + 1)``.

    They are never 0, and at most ``alpha`` with probability at most ``alpha``. Vovk et al.,
    "Algorithmic Learning in a Random World", 2005, for one score fitted to other data.

    Args:
        reference: ``(n,)``, sorted.
        scores: ``(N,)``.
    """
    below = np.searchsorted(reference, scores - SLACK, "left")
    return (1 + len(reference) - below) / (len(reference) + 1)


def simes(p_values: Sequence[float]) -> float:
    """One p-value for a group of images, ``min_i m p_(i) / i``.

    Simes, "An improved Bonferroni procedure", 1986. Valid for conformal p-values of one calibration
    set, which depend on each other positively (Bates et al., "Testing for Outliers with Conformal
    p-values", 2023).
    """
    ordered = np.sort(np.asarray(p_values, np.float64))
    return float(min(1.0, (len(ordered) * ordered / np.arange(1, len(ordered) + 1)).min()))


def benjamini_hochberg(p_values: Sequence[float], fdr: float) -> list[bool]:
    """Choose images to report: a fraction of at most ``fdr`` of them is expected to be false.

    Benjamini and Hochberg, "Controlling the False Discovery Rate", 1995.
    """
    values = np.asarray(p_values, np.float64)
    ordered = np.sort(values)
    places = np.arange(1, len(ordered) + 1)
    # Equality counts, which rounding must not hide.
    passing = np.flatnonzero(ordered * len(ordered) <= fdr * places * (1 + 1e-9))
    threshold = ordered[passing[-1]] if len(passing) else -1.0
    return [bool(v) for v in values <= threshold]
