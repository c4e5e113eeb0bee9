"""The Gaussian with independent dimensions, the only distribution of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def sum_dims(values: Tensor) -> Tensor:
    """Sum over everything but the batch: ``(N, ...)`` to ``(N,)``."""
    return values.flatten(1).sum(1)


def sum_channels(values: Tensor) -> Tensor:
    """Sum at each position: ``(N, C, H, W)`` to ``(N, H, W)``.

    Half of the channels are added to the other half, until one is left: the sums of ONNX Runtime's
    reduction depend on the size of the batch.
    """
    while values.shape[1] > 1:
        first, second, *odd = values.split(values.shape[1] // 2, dim=1)
        values = torch.cat([first + second, *odd], dim=1) if odd else first + second
    return values[:, 0]


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent normals; ``mean`` is ``(N, ...)``, ``log_scale`` broadcasts to it."""

    mean: Tensor
    log_scale: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """``mean + scale * eps``, with ``eps`` of the shape of ``mean``."""
        return self.mean + self.log_scale.exp() * eps

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of ``value``, ``(N,)``, nats."""
        return sum_dims(self.log_prob_terms(value))

    def log_prob_terms(self, value: Tensor) -> Tensor:
        """The terms of :meth:`log_prob`, one per dimension, the shape of ``value``, nats."""
        return -0.5 * self.standardize(value).square() - self.log_scale - HALF_LOG_TWO_PI

    def standardize(self, value: Tensor) -> Tensor:
        """``(value - mean) / scale``: standard normal if ``value`` comes from this distribution."""
        return (value - self.mean) * (-self.log_scale).exp()

    def kl_terms(self, other: DiagonalGaussian) -> Tensor:
        """The terms of ``KL(self || other)``, one per dimension, the shape of ``mean``, nats."""
        log_ratio = other.log_scale - self.log_scale
        shift = (self.mean - other.mean) * (-other.log_scale).exp()
        # Near equality, exp(…) - 1 would be little more than its rounding error.
        return log_ratio + 0.5 * (torch.expm1(-2 * log_ratio) + shift.square())
