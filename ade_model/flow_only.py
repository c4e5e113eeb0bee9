"""The decoder of a model that is a flow alone: ``z`` is ``y``, with a standard normal prior.

It takes the place of the autoencoder's decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ade_model.distributions import DiagonalGaussian, sum_dims
from ade_model.vae import Draw

LOG_ZERO = -104.0  # its exponential is zero in float32: the posterior of a flow is exact


class PointMass:
    """``p(y | z)`` where ``z`` is ``y``: a distribution without noise or cost.

    It has the methods of :class:`ade_model.distributions.DiagonalGaussian` that the model calls, of
    the same shapes; its log-density counts as 0.

    Args:
        mean: ``y``, ``(N, C, H, W)``.
    """

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def sample(self, eps: Tensor) -> Tensor:
        return self.mean

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.zeros_like(sum_dims(value))

    def log_prob_terms(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value)

    def standardize(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value)


class StandardNormal(nn.Module):
    """The prior of a flow, with the methods of :class:`ade_model.vae.Decoder`.

    Its only level of latents is ``y``, ``(N, C, H, W)``.
    """

    def infer(self, encoded: Tensor, eps: list[Tensor]) -> tuple[list[Draw], PointMass]:
        """``encoded`` is ``y`` itself."""
        prior = DiagonalGaussian(torch.zeros_like(encoded), torch.zeros_like(encoded))
        rate = -prior.log_prob_terms(encoded)
        posterior = DiagonalGaussian(encoded, torch.full_like(encoded, LOG_ZERO))
        return [Draw(posterior, encoded, prior, rate, rate)], PointMass(encoded)

    def generate(self, eps: list[Tensor]) -> tuple[list[Tensor], PointMass]:
        z = eps[0]
        return [z], PointMass(z)

    def forward(self, z: list[Tensor]) -> PointMass:
        return PointMass(z[0])
