"""Precision and recall: samples near real images, and real images near samples."""

from __future__ import annotations

import numpy as np
import torch

NEIGHBOURS = 3


def improved_precision_recall(generated: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """The share of samples near a real image, and of real images near a sample.

    Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
    2019, eq. 1 and 2. An image is near if it is no farther than the third nearest neighbour in the
    other's own set.

    Args:
        generated: ``(N, F)``.
        real: ``(N, F)``: as many, since distances of neighbours depend on the density of a set.

    Returns:
        Precision and recall, each from 0 to 1.

    Raises:
        ValueError: the shapes differ, or there are too few rows.
    """
    if generated.shape != real.shape or len(real) <= NEIGHBOURS:
        raise ValueError(
            f"features must be (N, F) twice, with more than {NEIGHBOURS} rows, "
            f"got {generated.shape} and {real.shape}"
        )
    a, b = torch.from_numpy(generated), torch.from_numpy(real)
    apart = torch.cdist(a, b)
    precision = (apart <= _reach(b)).any(1).double().mean()
    recall = (_reach(a) >= apart.T).any(1).double().mean()
    return float(precision), float(recall)


def _reach(features: torch.Tensor) -> torch.Tensor:
    """Each row's distance to its third nearest neighbour, ``(N,)``."""
    return torch.cdist(features, features).kthvalue(NEIGHBOURS + 1).values
