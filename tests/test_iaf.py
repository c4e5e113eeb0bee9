"""The inverse autoregressive step: its order, its determinant and its bound on the likelihood."""

import torch

from ade_model.iaf import InverseAutoregressiveStep
from tests.helpers import TINY, make_model, shake


def jacobian(step, z0, context):
    size = z0.numel()
    found = torch.autograd.functional.jacobian(
        lambda z: step(z.view_as(z0), context)[0].flatten(), z0.flatten()
    )
    return found.view(size, size)


def test_every_value_depends_on_those_before_it_alone():
    torch.manual_seed(0)
    step = shake(InverseAutoregressiveStep(3, 2).double(), scale=0.5)
    z0, context = (
        torch.randn(1, 3, 3, 3, dtype=torch.float64),
        torch.randn(1, 2, 3, 3, dtype=torch.float64),
    )
    found = jacobian(step, z0, context)
    # In the order of the sequence: rows, columns, and at one position channels.
    order = torch.arange(27).view(3, 3, 3).permute(1, 2, 0).flatten()
    triangular = found[order][:, order]
    assert triangular.triu(1).abs().max() == 0
    assert triangular.tril(-1).abs().max() > 1e-3
    _, log_det = step(z0, context)
    assert torch.allclose(log_det[0].sum(), torch.linalg.slogdet(found)[1], atol=1e-9)


def test_it_starts_as_the_identity_and_sees_its_context():
    torch.manual_seed(0)
    step = InverseAutoregressiveStep(2, 2)
    z0, context = torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4, 4)
    z, log_det = step(z0, context)
    assert torch.equal(z, z0) and log_det.abs().max() == 0
    shake(step)
    assert not torch.allclose(step(z0, context)[0], step(z0, -context)[0])


def test_the_step_changes_the_posterior_and_nothing_of_the_generator():
    import dataclasses

    torch.manual_seed(1)
    model = make_model(dataclasses.replace(TINY, posterior_iaf=True)).double()
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    eps = [torch.randn(3, *shape, dtype=torch.float64) for shape in TINY.latent_shapes]
    encoding = model.encode(x, eps)
    assert not torch.allclose(encoding.z[0], encoding.posteriors[0].sample(eps[0]))
    score, terms = model.elbo_terms(x, eps), model.elbo_terms_with_analytic_kl(x, eps)[0]
    # There is no closed form: both are computed from the draw.
    assert torch.allclose(score.log_weight, terms.log_weight)
    before = model.sample(eps)
    shake(model.decoder.levels[0].iaf, scale=1.0)
    assert torch.equal(model.sample(eps), before)
    assert not torch.allclose(model.elbo_terms(x, eps).log_weight, score.log_weight)
