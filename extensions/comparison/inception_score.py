"""The Inception score, by Inception or by another classifier."""

from __future__ import annotations

import numpy as np
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

SPLITS = 10


def inception_score(logits: np.ndarray, splits: int = SPLITS) -> dict[str, float]:
    """``exp E_x KL(p(y | x) || p(y))``, its mean and standard deviation over splits.

    Salimans et al., "Improved Techniques for Training GANs", 2016, section 4.

    Args:
        logits: ``(N, classes)`` of generated images.
        splits: number of parts of the set, each of which is scored.

    Returns:
        ``mean`` and ``std`` over the splits, from 1 to the number of classes, and ``splits``.

    Raises:
        ValueError: there are fewer rows than splits.
    """
    if logits.ndim != 2 or len(logits) < splits:
        raise ValueError(
            f"logits must be (N, classes) with at least {splits} rows, got {logits.shape}"
        )
    found = isc_features_to_metric(torch.from_numpy(logits), splits)
    return {
        "mean": found["inception_score_mean"],
        "std": found["inception_score_std"],
        "splits": splits,
    }
