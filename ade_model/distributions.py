"""The one distribution of this model: a Gaussian with independent dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def sum_dims(values: Tensor) -> Tensor:
    """``(N, ...)`` to ``(N,)``: the sum over everything but the batch."""
    return values.flatten(1).sum(1)


def sum_channels(values: Tensor) -> Tensor:
    """``(N, C, H, W)`` to ``(N, H, W)``: the sum at each position.

    Added up channel by channel: with a reduction over them ONNX Runtime's sums vary with the size
        of the batch.
    """
    first, *others = values.unbind(1)
    return sum(others, first)


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent normals; ``mean`` is ``(N, ...)``, ``log_scale`` broadcasts to it."""

    mean: Tensor
    log_scale: Tensor

    def sample(self, eps: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
        """``mean + temperature * scale * eps`` for standard normal ``eps`` of the shape of
        ``mean``.
        """
        return self.mean + temperature * self.log_scale.exp() * eps

    def log_prob(self, value: Tensor) -> Tensor:
        """``(N,)``, nats."""
        return sum_dims(self.log_prob_terms(value))

    def log_prob_terms(self, value: Tensor) -> Tensor:
        """Of each dimension, the shape of ``value``, nats; they sum to :meth:`log_prob`."""
        return -0.5 * self.standardize(value).square() - self.log_scale - HALF_LOG_TWO_PI

    def standardize(self, value: Tensor) -> Tensor:
        """``(value - mean) / scale``: standard normal if ``value`` comes from this distribution."""
        return (value - self.mean) * (-self.log_scale).exp()

    def kl(self, other: DiagonalGaussian) -> Tensor:
        """``KL(self || other)`` in closed form, ``(N,)``, nats, never negative."""
        return sum_dims(self.kl_terms(other))

    def kl_terms(self, other: DiagonalGaussian) -> Tensor:
        """Of each dimension, the shape of ``mean``, nats, never negative; they sum to :meth:`kl`."""
        log_ratio = other.log_scale - self.log_scale
        shift = (self.mean - other.mean) * (-other.log_scale).exp()
        return log_ratio + 0.5 * ((-2 * log_ratio).exp() + shift.square() - 1)
