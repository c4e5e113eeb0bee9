"""The losses, and the discriminators of pixels."""

import math

import pytest
import torch

from ade_model.likelihood import ElboTerms
from training.config import DiscriminatorConfig
from training.discriminator import Discriminator
from training.losses import (
    coverage_loss,
    discriminator_loss,
    gradient_penalty,
    latent_surcharge,
    quality_loss,
)


def test_free_bits_charge_only_what_exceeds_them():
    """Channel by channel, over the batch; the bound itself stays as it is."""
    kl = [
        torch.tensor([[1.0, 5.0], [2.0, 3.0]], requires_grad=True),
        torch.tensor([[0.5], [0.7]], requires_grad=True),
    ]
    terms = ElboTerms(torch.zeros(2), torch.zeros(2), [level.sum(1) for level in kl], kl)
    same = lambda flat: flat
    dims, nat = 12, 1 / (12 * math.log(2))
    bound = coverage_loss(terms, dims)
    assert latent_surcharge(terms, dims, 0.0, same).item() == pytest.approx(0, abs=1e-6)
    surcharge = latent_surcharge(terms, dims, 2.0, same)  # channels have 1.5, 4 and 0.6
    assert surcharge.item() == pytest.approx((2.0 + 4.0 + 2.0 - 6.1) * nat)
    (bound + surcharge).backward()
    assert kl[0].grad is not None and kl[1].grad is not None
    assert torch.allclose(kl[0].grad, torch.tensor([[0.0, nat / 2]] * 2)) and not kl[1].grad.any()
    # Whether a channel is charged is decided over all processes: here others' batches had 4 nats
    # more.
    surcharge = latent_surcharge(terms, dims, 2.0, lambda flat: flat.add_(4))
    assert surcharge.item() == pytest.approx(0, abs=1e-6)


def test_losses():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 1.0])
    d_real, d_fake = real.sigmoid(), fake.sigmoid()
    expected = -(d_real.log().mean() + (1 - d_fake).log().mean())
    assert torch.allclose(discriminator_loss(real, fake), expected)
    assert torch.allclose(
        quality_loss(fake), -(d_fake.log() - (1 - d_fake).log()).mean(), atol=1e-6
    )


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_gradient_penalty(target):
    linear = torch.nn.Linear(12, 1)
    discriminator = torch.nn.Sequential(torch.nn.Flatten(), linear, torch.nn.Flatten(0))
    penalty = gradient_penalty(discriminator, torch.rand(5, 3, 2, 2), target)
    assert penalty.item() == pytest.approx((linear.weight.norm().item() - target) ** 2, rel=1e-4)
    penalty.backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_discriminator_shapes(kind):
    for size, patch, plain in ((32, 1, 0), (48, 2, 1), (64, 2, 2)):
        discriminator = Discriminator(DiscriminatorConfig((4, 4, 4), kind, plain, patch), size, 3)
        assert discriminator(torch.rand(2, 3, size, size)).shape == (2,)
