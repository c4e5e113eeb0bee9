"""The Fréchet distance between two sets of features, each modelled as a Gaussian."""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017, eq. 6, for features of any
    network.

    Args:
        a: ``(N, F)``; see :func:`is_rank_deficient`.
        b: ``(M, F)``.

    Raises:
        ValueError: the shapes do not match, or a set has fewer than two rows.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            "features must be (N, F) and (M, F) with at least two rows each, "
            f"got {a.shape} and {b.shape}"
        )
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(covariance_a)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    # S_a S_b has the eigenvalues of the symmetric matrix root S_b root.
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ covariance_b @ root), 0, None)).sum()
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    return float(shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)


def is_rank_deficient(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether a covariance is singular, because a set has too few rows for its columns.

    The distance then depends on the number of images more than on what they show.
    """
    return bool(min(len(a), len(b)) <= a.shape[1])
