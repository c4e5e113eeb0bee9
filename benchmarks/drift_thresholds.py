"""Drift thresholds: images until a false alarm, and images until a change is detected.

The verdicts are simulated. Each stream has its own calibration of n images, because a calibration
has errors of its own.

``python -m benchmarks.drift_thresholds``
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from serving.verdict.drift import ALLOWANCE, WINDOW, DriftMonitor

CALIBRATED = (1000, 3000, 10_000)
THRESHOLDS = (5.0, 6.0, 8.0, 10.0)
STREAMS, LENGTH = 600, 60_000
DISTANCES = (1.63, 1.95, 2.2)
WINDOWS = 2000


def _verdicts(rng: np.random.Generator, n: int, count: int, shift: float = 0.0) -> np.ndarray:
    """Normal scores ``Phi^-1(1 - p)`` of randomised conformal p-values of normal OOD scores."""
    reference = np.sort(rng.normal(size=n))
    above = n - np.searchsorted(reference, rng.normal(shift, 1, count))
    return stats.norm.isf((above + rng.uniform(size=count)) / (n + 1))


def _first_crossings(z: np.ndarray) -> list[int]:
    """Images until the cumulative sum crosses each threshold; the length if it does not."""
    total, found = 0.0, [len(z)] * len(THRESHOLDS)
    waiting = 0
    for i, value in enumerate(z):
        total = max(0.0, total + value - ALLOWANCE)
        while waiting < len(THRESHOLDS) and total > THRESHOLDS[waiting]:
            found[waiting] = i + 1
            waiting += 1
        if waiting == len(THRESHOLDS):
            break
    return found


def main() -> None:
    rng = np.random.default_rng(0)
    print(
        "| n | threshold | images without a change, mean | median "
        "| images after a shift of 1, mean |"
    )
    print("|---|---|---|---|---|")
    for n in CALIBRATED:
        quiet = np.array([_first_crossings(_verdicts(rng, n, LENGTH)) for _ in range(STREAMS)])
        shifted = np.array([_first_crossings(_verdicts(rng, n, 500, 1.0)) for _ in range(STREAMS)])
        for j, threshold in enumerate(THRESHOLDS):
            alone = quiet[:, j]
            censored = " (at least)" if (alone == LENGTH).mean() > 0.02 else ""
            print(
                f"| {n} | {threshold:g} | {alone.mean():.0f}{censored} | {np.median(alone):.0f} "
                f"| {shifted[:, j].mean():.1f} |"
            )
    print(f"\n| n | distance over {WINDOW} images | windows without a change above it |")
    print("|---|---|---|")
    for n in CALIBRATED:
        distances = []
        for _ in range(WINDOWS):
            monitor = DriftMonitor()
            for p in stats.norm.sf(_verdicts(rng, n, WINDOW)):
                monitor.update(float(p))
            distances.append(monitor.distance())
        for limit in DISTANCES:
            print(f"| {n} | {limit} | {np.mean(np.array(distances) > limit):.4f} |")


if __name__ == "__main__":
    main()
