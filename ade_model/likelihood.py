"""Bounds on the likelihood from draws of the latents, and bits per dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ade_model.errors import ShapeError
from ade_model.quantization import NUM_LEVELS


@dataclass(frozen=True)
class ElboTerms:
    """The terms of one draw's log-weight ``log p(x, z) - log q(z | x)``; each ``(N,)``, nats.

    Attributes:
        log_prob_y: ``log p(y | z)``.
        log_det_jacobian: ``log |det df/dx|``; with a learned dequantisation, minus the log density
            of the positions within the pixels' bins, too.
        kl: one per level, ``log q(z_i | ...) - log p(z_i | ...)`` at the draw, or its expectation.
        kl_by_channel: one per level, ``(N, latent_channels)``, each channel's share of ``kl``; only
            from :meth:`ade_model.model.ADEModel.elbo_terms_with_analytic_kl`.
    """

    log_prob_y: Tensor
    log_det_jacobian: Tensor
    kl: list[Tensor]
    kl_by_channel: list[Tensor] = field(default_factory=list)

    @property
    def log_weight(self) -> Tensor:
        """Log-weight of the draw for ``x`` in [0, 1), ``(N,)``, nats; its mean is the ELBO."""
        total = self.log_prob_y + self.log_det_jacobian
        for kl in self.kl:
            total = total - kl
        return total


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """Bound the log-likelihood by ``log mean_k exp(log_weight_k)``.

    Burda et al., "Importance Weighted Autoencoders", 2016, eq. 8.

    Args:
        log_weights: ``(K, N)``, nats, from independent draws of latents and of the dequantisation.

    Returns:
        ``(N,)``, nats; with ``K = 1`` an estimate of the ELBO.

    Raises:
        ShapeError: ``log_weights`` is not ``(K, N)``.
    """
    if log_weights.ndim != 2:
        raise ShapeError(f"log_weights must be (K, N), got {tuple(log_weights.shape)}")
    return torch.logsumexp(log_weights, dim=0) - math.log(log_weights.shape[0])


def bits_per_dim(log_prob: Tensor, num_dims: int) -> Tensor:
    """Turn a log-likelihood of ``x`` into a code length per value of the stored image.

    A lower bound on ``log_prob`` gives an upper bound on the result.

    Args:
        log_prob: ``(N,)``, nats, log density of dequantised images ``x`` in [0, 1).
        num_dims: values per image, ``C * H * W``.

    Returns:
        ``(N,)``, bits per dimension of the 8-bit image. Lower is better.

    Raises:
        ShapeError: ``log_prob`` is not one value per image.

    Example:
        >>> uniform = torch.zeros(2)  # density 1 on the unit cube
        >>> bits_per_dim(uniform, num_dims=12)
        tensor([8., 8.])
    """
    if log_prob.ndim != 1:
        raise ShapeError(f"log_prob must be (N,), got {tuple(log_prob.shape)}")
    return math.log2(NUM_LEVELS) - log_prob / (num_dims * math.log(2.0))
