"""Precision and recall of samples, by two definitions.

Precision is the share of samples that are like real images; recall is the share of real images that
samples cover.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from torch_fidelity.metric_prc import prc_features_to_metric

CLUSTERS, ANGLES, RUNS, BETA = 20, 1001, 10, 8.0
NEIGHBOURS = 3


def improved_precision_recall(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """The share of samples near a real image, and of real images near a sample.

    Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
    2019. An image is near if it is closer than the third nearest neighbour in the other's own set.

    Args:
        generated: ``(N, F)``.
        real: ``(M, F)``; the larger set is cut to the size of the smaller one, since distances of
            neighbours depend on the density of a set.

    Returns:
        ``precision`` and ``recall``, from 0 to 1, and the numbers of ``neighbours`` and ``images``.
    """
    size = min(len(generated), len(real))
    generated, real = generated[:size], real[:size]
    found = prc_features_to_metric(
        torch.from_numpy(generated),
        torch.from_numpy(real),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=2000,
        save_cpu_ram=True,
        verbose=False,
    )
    return {
        "precision": found["precision"],
        "recall": found["recall"],
        "neighbours": NEIGHBOURS,
        "images": size,
    }


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
