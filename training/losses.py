"""The losses: the paper's L_C and L_Q, and those of the discriminator."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_model.likelihood import ElboTerms, bits_per_dim


def coverage_loss(terms: ElboTerms, num_dims: int) -> Tensor:
    """L_C, the mean bound on the negative log-likelihood (paper, eq. 4); scalar, bits per dim."""
    return bits_per_dim(terms.log_weight, num_dims).mean()


def latent_surcharge(
    terms: ElboTerms,
    num_dims: int,
    free_bits: float,
    average: Callable[[Tensor], Tensor],
) -> Tensor:
    """The term that training adds to L_C so that latents are used; scalar, bits per dimension.

    The KL of each latent channel, summed over its positions and averaged over the batch, counts as
    at least ``free_bits``, so that nothing is gained by giving up a channel that carries less
    (Kingma et al., "Improved variational inference with inverse autoregressive flow", 2016, "free
    bits").

    Args:
        terms: result of :meth:`ade_model.model.ADEModel.elbo_terms_with_analytic_kl`.
        num_dims: values per image, ``C * H * W``.
        free_bits: nats per channel and image.
        average: averages a flat vector over processes, in place; the mean decides whether a channel
            is charged.
    """
    kl = torch.cat([level.mean(0) for level in terms.kl_by_channel])
    charged = torch.where(average(kl.detach().clone()) > free_bits, kl, free_bits)
    return (charged.sum() - kl.sum()) / (num_dims * math.log(2.0))


def quality_loss(logits_fake: Tensor) -> Tensor:
    """L_Q of the generator, the negative mean logit: ``-E[ln D - ln(1 - D)]`` (paper, eq. 5).

    Nats, of a logistic discriminator; the logits of one with a hinge loss have no unit.
    """
    return -logits_fake.mean()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """``-E[ln D(x)] - E[ln(1 - D(x_fake))]`` (paper, section 3); scalar, nats."""
    return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """``E[max(0, 1 - logit(x))] + E[max(0, 1 + logit(x_fake))]``; scalar.

    Lim and Ye, "Geometric GAN", 2017. Projected discriminators use it, as in their authors' code.
    """
    return F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean()


def gradient_penalty(discriminator: nn.Module, points: Tensor, target: float) -> Tensor:
    """``E[(|grad D(x)| - target)^2]`` at ``points``; scalar.

    ``target = 1`` is the two-sided penalty of Gulrajani et al., "Improved Training of Wasserstein
    GANs", 2017, eq. 3; ``target = 0`` the zero-centred one of Thanh-Tung et al., "Improving
    Generalization and Stability of Generative Adversarial Networks", 2019, eq. 8.

    Args:
        discriminator: returns one logit per image, ``(N,)``; the slope of several would be that of
            their sum.
        points: ``(N, C, H, W)`` in the discriminator's input range.
        target: slope per unit of the input.
    """
    points = points.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
    squared = slope.flatten(1).square().sum(1)
    if target == 0:
        return squared.mean()
    return ((squared + 1e-12).sqrt() - target).square().mean()
