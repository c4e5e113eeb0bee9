"""The kernel distance between two sets of features.

It is unbiased, so that distances of different numbers of samples can be compared.
"""

from __future__ import annotations

import numpy as np
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

SUBSETS, SUBSET_SIZE = 50, 1000


def kernel_distance(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Squared maximum mean discrepancy under ``(a.b / F + 1)^3``, mean and deviation over subsets.

    Binkowski et al., "Demystifying MMD GANs", 2018, section 4. In Inception's features it is the
    KID.

    Args:
        generated: ``(N, F)``.
        real: ``(M, F)``.

    Raises:
        ValueError: the shapes do not match.
    """
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"features must be (N, F) and (M, F), got {generated.shape} and {real.shape}"
        )
    size = min(SUBSET_SIZE, len(generated), len(real))
    found = kid_features_to_metric(
        torch.from_numpy(generated),
        torch.from_numpy(real),
        kid_subsets=SUBSETS,
        kid_subset_size=size,
        verbose=False,
    )
    return {
        "mean": found["kernel_inception_distance_mean"],
        "std": found["kernel_inception_distance_std"],
        "subsets": SUBSETS,
        "subset_size": size,
    }
