"""What the optimisers minimise: the paper's L_C and L_Q, and the discriminator's loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_model.likelihood import Evidence, bits_per_dim


def coverage_loss(evidence: Evidence, num_dims: int) -> Tensor:
    """L_C, the mean bound on the negative log-likelihood (paper, eq. 5), in bits per dimension; scalar."""
    return bits_per_dim(evidence.log_weight, num_dims).mean()


def quality_loss(logits_fake: Tensor) -> Tensor:
    """L_Q for the generator: ``-E[ln D - ln(1 - D)]``, minus the mean logit (paper, eq. 3); scalar."""
    return -logits_fake.mean()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """``-E[ln D(x)] - E[ln(1 - D(x_fake))]`` (paper, section 3); scalar, nats."""
    return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()


def gradient_penalty(discriminator: nn.Module, points: Tensor, target: float) -> Tensor:
    """``E[(|grad D(x)| - target)^2]`` at ``points``; scalar.

    ``target = 1`` is the two-sided penalty of Gulrajani et al., "Improved Training of Wasserstein GANs",
    2017, eq. 3; ``target = 0`` the zero-centred one of Thanh-Tung et al., "Improving Generalization and
    Stability of Generative Adversarial Networks", 2019, eq. 8.

    Args:
        discriminator: gives logits ``(N,)``.
        points: ``(N, C, H, W)`` in the discriminator's input range.
        target: the slope to keep, per unit of the input.
    """
    points = points.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
    squared = slope.flatten(1).square().sum(1)
    if target == 0:
        return squared.mean()
    return ((squared + 1e-12).sqrt() - target).square().mean()
