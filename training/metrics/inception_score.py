"""The Inception score, and the same of another classifier: how sure its classes are, and how many."""

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
        splits: parts of the set that are scored apart.
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
