"""Precision and recall by the paper's definition, that of Sajjadi et al."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import MiniBatchKMeans

CLUSTERS, ANGLES, RUNS, BETA = 20, 1001, 10, 8.0


def prd_curve(generated: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall between two histograms at every trade-off.

    The curve is evaluated at :data:`ANGLES` slopes between 0 and 90 degrees.

    Sajjadi et al., "Assessing Generative Models via Precision and Recall", 2018, eq. 6 and 7.

    Args:
        generated: ``(bins,)``, sums to 1.
        real: likewise.

    Returns:
        Precision and recall, each ``(ANGLES,)``.
    """
    margin = 1e-6
    slopes = np.tan(np.linspace(margin, np.pi / 2 - margin, ANGLES))
    precision = np.minimum(slopes[:, None] * real, generated).sum(1)
    return np.clip(precision, 0, 1), np.clip(precision / slopes, 0, 1)


def prd_f_scores(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """``F_8``, which weighs recall, and ``F_1/8``, which weighs precision.

    Each is the maximum over the mean curve of ten clusterings.

    Args:
        generated: features ``(N, F)``.
        real: features ``(M, F)``; the larger set is cut to the size of the smaller one.

    Returns:
        ``f8`` and ``f1_8``, from 0 to 1, and the numbers of ``clusters``, ``runs`` and ``images``.
    """
    size = min(len(generated), len(real))
    generated, real = generated[:size], real[:size]
    curves = []
    for run in range(RUNS):
        labels = (
            MiniBatchKMeans(min(CLUSTERS, size), n_init=3, random_state=run)
            .fit(np.concatenate([generated, real]))
            .labels_
        )
        histograms = [
            np.bincount(part, minlength=CLUSTERS) / size for part in (labels[:size], labels[size:])
        ]
        curves.append(prd_curve(histograms[0], histograms[1]))
    precision, recall = np.mean(curves, axis=0)

    def best(beta: float) -> float:
        scores = (
            (1 + beta**2) * precision * recall / np.maximum(beta**2 * precision + recall, 1e-12)
        )
        return float(scores.max())

    return {
        "f8": best(BETA),
        "f1_8": best(1 / BETA),
        "clusters": CLUSTERS,
        "runs": RUNS,
        "images": size,
    }
