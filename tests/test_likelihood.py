"""The likelihood against known answers, from a uniform model to the Kraft inequality."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import ade_model.likelihood
import ade_model.quantization
from ade_model.config import ModelConfig
from ade_model.distributions import DiagonalGaussian, sum_dims
from ade_model.errors import ShapeError
from ade_model.likelihood import bits_per_dim, importance_weighted_bound
from ade_model.model import ADEModel
from ade_model.quantization import dequantize
from ade_model.vae import Draw
from tests.helpers import TINY, make_model, narrow, shake
from training.evaluate import likelihood_figures

# Four pixels and one latent: small enough to integrate.
FOUR_PIXELS = ModelConfig(
    image_size=2,
    channels=1,
    widths=(6,),
    latent_channels=(1,),
    decoder_blocks=(1,),
    flow_couplings=2,
    flow_width=6,
)


def four_pixel_model(scale=0.3):
    torch.manual_seed(3)
    return shake(ADEModel(FOUR_PIXELS).double(), seed=3, scale=scale).eval()


def log_density(model, x):
    """``log p(x)`` by quadrature over the one latent."""
    z = torch.linspace(-7, 7, 57, dtype=torch.float64)
    eps = z.reshape(-1, 1, 1, 1)
    with torch.no_grad():
        values, p_y = model.decoder.generate([eps])
        # generate() maps standard normals to latents: in that variable the prior is N(0, 1).
        log_prior = -0.5 * z.square() - 0.5 * math.log(2 * math.pi) + math.log(float(z[1] - z[0]))
        y, log_det_jacobian = model.flow(x)
        standard = (y.flatten(1)[:, None] - p_y.mean.flatten(1)) * (-p_y.log_scale.flatten(1)).exp()
        log_likelihood = (
            -0.5 * standard.square() - p_y.log_scale.flatten(1) - 0.5 * math.log(2 * math.pi)
        ).sum(2)
    return torch.logsumexp(log_likelihood + log_prior, 1) + log_det_jacobian


def test_a_uniform_model_has_exactly_8_bits():
    assert bits_per_dim(torch.zeros(5), num_dims=3072).tolist() == [8.0] * 5


def test_one_nat_per_dimension():
    assert bits_per_dim(
        torch.tensor([12 * math.log(2.0)], dtype=torch.float64), 12
    ).item() == pytest.approx(7.0)


def test_log_prob_must_be_one_value_per_image():
    with pytest.raises(ShapeError, match=r"log_prob must be \(N,\), got \(2, 3\)"):
        bits_per_dim(torch.zeros(2, 3), 3)
    with pytest.raises(ShapeError, match=r"\(K, N\)"):
        importance_weighted_bound(torch.zeros(3))


def test_density_integrates_to_one():
    """Integrated over the flow's domain in ``l = logit(0.05 + 0.9 x)``, where it is smooth."""
    model = four_pixel_model()
    cells, bound = 24, 8.0
    step = 2 * bound / cells
    axis = -bound + step * (torch.arange(cells, dtype=torch.float64) + 0.5)
    total = 0.0
    for first in axis:
        rest = torch.cartesian_prod(axis, axis, axis)
        logits = torch.cat([first.expand(len(rest), 1), rest], 1)
        p = logits.sigmoid()
        x = ((p - 0.05) / 0.9).reshape(-1, 1, 2, 2)
        log_dx = (p * (1 - p) / 0.9).log().sum(1)
        total += float((log_density(model, x) + log_dx).exp().sum()) * step**4
    assert total == pytest.approx(1.0, abs=1e-3)


def test_bounds_lie_below_the_likelihood_and_tighten():
    model = four_pixel_model(scale=0.15)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 1, 2, 2, generator=generator, dtype=torch.float64)
    exact = log_density(model, x).mean()
    draws = 2048
    with torch.no_grad():
        weights = torch.stack(
            [
                model.elbo_terms(
                    x, [torch.randn(64, 1, 1, 1, generator=generator, dtype=torch.float64)]
                ).log_weight
                for _ in range(draws)
            ]
        )
    bounds = []
    for k in (1, 4, 16, 64, 256):
        groups = weights.reshape(draws // k, k, 64)
        each = torch.stack([importance_weighted_bound(group) for group in groups]).mean(1)
        bounds.append((float(each.mean()), float(each.std() / math.sqrt(len(each)))))
    for (lower, _), (higher, error) in itertools.pairwise(bounds):
        assert higher > lower - 3 * error
    last, error = bounds[-1]
    assert last <= exact + 3 * error
    assert last == pytest.approx(float(exact), abs=0.02 + 3 * error)
    assert bounds[0][0] < last - 0.01  # the posterior is not exact: there is a gap to close


def test_iwae_1_is_the_elbo():
    weights = torch.randn(1, 7, dtype=torch.float64)
    assert torch.equal(importance_weighted_bound(weights), weights[0])


def test_the_kl_by_level_is_the_mean_of_the_models_own_terms():
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
    model, cpu = make_model(), torch.device("cpu")
    found = likelihood_figures(model, images, cpu, seed=5)
    generator = torch.Generator().manual_seed(5)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    u = torch.rand(pixels.shape, generator=generator)
    eps = [torch.randn(7, *shape, generator=generator) for shape in TINY.latent_shapes]
    with torch.no_grad():
        terms = model.elbo_terms(model.dequantize(pixels, u), eps)
    kl = [level.mean().item() / (TINY.num_dims * math.log(2)) for level in terms.kl]
    assert found["kl"]["images"] == found["bpd"]["images"] == 7 and len(kl) == len(TINY.widths)
    assert found["kl"]["levels"] == pytest.approx(kl)
    assert found["kl"]["value"] == pytest.approx(sum(kl))
    flow_alone = make_model(narrow("real-nvp").model)
    assert likelihood_figures(flow_alone, images, cpu)["kl"]["value"] is None


class LinearDecoder(nn.Module):
    """``y = w z + b + s noise`` with ``z ~ N(0, 1)``, and its exact posterior."""

    def __init__(self, w, b, log_s):
        super().__init__()
        self.w, self.b, self.log_s = w, b, log_s

    def infer(self, encoded, eps):
        (y,) = encoded
        precision = 1 + self.w.square().sum() * math.exp(-2 * self.log_s)
        mean = (
            ((y - self.b) * self.w).sum((1, 2, 3), keepdim=True)
            * math.exp(-2 * self.log_s)
            / precision
        )
        posterior = DiagonalGaussian(mean, -0.5 * precision.log().expand_as(mean))
        prior = DiagonalGaussian(torch.zeros_like(mean), torch.zeros_like(mean))
        z = posterior.sample(eps[0])
        log_scale = torch.tensor(self.log_s, dtype=y.dtype)
        draw = Draw(
            posterior,
            z,
            prior,
            posterior.log_prob_terms(z) - prior.log_prob_terms(z),
            posterior.kl_terms(prior),
        )
        return [draw], DiagonalGaussian(self.w * z + self.b, log_scale)


@pytest.mark.parametrize("scales", [0, 1])
def test_a_linear_gaussian_model_has_its_closed_form(scales):
    config = ModelConfig(
        image_size=2,
        channels=1,
        widths=(4,),
        latent_channels=(1,),
        decoder_blocks=(1,),
        flow_scales=scales,
        flow_couplings=1,
        flow_width=4,
    )
    model = shake(ADEModel(config).double())
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 1, 2, 2, generator=generator, dtype=torch.float64)
    b = torch.randn(1, 1, 2, 2, generator=generator, dtype=torch.float64)
    model.encoder = nn.Identity()  # infer() below wants y itself
    model.encoder.forward = lambda y: [y]
    model.decoder = LinearDecoder(w, b, math.log(0.4))
    x = torch.rand(5, 1, 2, 2, generator=generator, dtype=torch.float64)
    y, log_det_jacobian = model.flow(x)
    covariance = w.flatten()[:, None] * w.flatten() + 0.16 * torch.eye(4, dtype=torch.float64)
    exact = (
        torch.distributions.MultivariateNormal(b.flatten(), covariance).log_prob(y.flatten(1))
        + log_det_jacobian
    )
    weights = torch.stack(
        [
            model.elbo_terms(
                x, [torch.randn(5, 1, 1, 1, generator=generator, dtype=torch.float64)]
            ).log_weight
            for _ in range(16)
        ]
    )
    assert torch.allclose(weights, exact.expand(16, 5), atol=1e-9)  # every draw weighs the same
    assert torch.allclose(importance_weighted_bound(weights), exact, atol=1e-9)


def test_kraft_inequality(monkeypatch):
    """Code lengths of all images of a small alphabet fit into one prefix code."""
    monkeypatch.setattr(ade_model.quantization, "NUM_LEVELS", 4)
    monkeypatch.setattr(ade_model.likelihood, "NUM_LEVELS", 4)
    model = four_pixel_model()
    images = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.float64).reshape(
        -1, 1, 2, 2
    )
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            log_density(
                model,
                dequantize(
                    images, torch.rand(images.shape, generator=generator, dtype=torch.float64)
                ),
            )
            for _ in range(64)
        ]
    )
    bits = 4 * bits_per_dim(draws.mean(0), num_dims=4)
    kraft = float((2.0**-bits).sum())
    assert 0.3 < kraft <= 1.0


def test_kl_in_closed_form_is_the_mean_of_the_sampled_one():
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 2, 2)
    q, p = (
        DiagonalGaussian(
            torch.randn(shape, generator=generator, dtype=torch.float64),
            0.3 * torch.randn(shape, generator=generator, dtype=torch.float64),
        )
        for _ in range(2)
    )
    draws = [
        q.sample(torch.randn(shape, generator=generator, dtype=torch.float64)) for _ in range(4000)
    ]
    ratios = torch.stack([q.log_prob(z) - p.log_prob(z) for z in draws])
    assert torch.allclose(
        ratios.mean(0),
        sum_dims(q.kl_terms(p)),
        atol=4 * float(ratios.std(0).max()) / math.sqrt(4000),
    )
    assert torch.equal(q.kl_terms(q), torch.zeros(shape, dtype=torch.float64))


def test_elbo_terms_and_score_differ_in_the_kl_alone():
    model = make_model().double()
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    eps = [torch.randn(4, *shape, dtype=torch.float64) for shape in TINY.latent_shapes]
    sampled, closed = model.elbo_terms(x, eps), model.elbo_terms_with_analytic_kl(x, eps)[0]
    assert torch.equal(sampled.log_prob_y, closed.log_prob_y)
    assert torch.equal(sampled.log_det_jacobian, closed.log_det_jacobian)
    assert all((kl >= 0).all() for kl in closed.kl)
