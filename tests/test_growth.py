"""Growth: a larger model computes what the smaller one that it starts from did."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from ade_base.errors import ConfigError
from ade_model.config import ModelConfig
from ade_model.model import ADEModel
from training.growth import check_growth, grown_weights

BEFORE = ModelConfig(
    image_size=8,
    widths=(12, 8),
    latent_channels=(3, 2),
    decoder_blocks=(1, 1),
    flow_scales=1,
    flow_couplings=2,
    flow_blocks=1,
    flow_width=6,
)


def shaken(config: ModelConfig) -> ADEModel:
    """A model in which every weight has an effect."""
    torch.manual_seed(0)
    model = ADEModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def grown(model: ADEModel, **changes: Any) -> ADEModel:
    larger = ADEModel(dataclasses.replace(model.config, **changes)).eval()
    grown_weights(model.state_dict(), model.config, larger)
    return larger


def noise(config: ModelConfig, n: int) -> list[torch.Tensor]:
    return [torch.randn(n, *shape) for shape in config.latent_shapes]


@pytest.mark.parametrize(
    "changes",
    [
        {"flow_width": 9},
        {"flow_couplings": 4},
        {"flow_couplings": 5},
        {"flow_scales": 2},
        {"flow_blocks": 2},
        {"decoder_blocks": (1, 3)},
        {"flow_scales": 2, "flow_couplings": 3, "flow_blocks": 3, "flow_width": 7},
    ],
    ids=str,
)
def test_a_grown_model_computes_the_same(changes: dict[str, Any]) -> None:
    small = shaken(BEFORE)
    large = grown(small, **changes)
    eps = noise(BEFORE, 3)
    x = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(small.sample(eps), large.sample(eps), atol=1e-5)
        old, new = (
            small.elbo_terms_with_analytic_kl(x, eps)[0],
            large.elbo_terms_with_analytic_kl(x, eps)[0],
        )
        assert torch.allclose(old.log_weight, new.log_weight, rtol=1e-5)


def test_it_grows_from_two_scales() -> None:
    small = shaken(dataclasses.replace(BEFORE, flow_scales=2))
    large = grown(small, flow_couplings=4, flow_scales=3)
    eps = noise(BEFORE, 3)
    with torch.no_grad():
        assert torch.allclose(small.sample(eps), large.sample(eps), atol=1e-5)


def test_new_latents_change_no_sample_and_can_learn() -> None:
    small = shaken(BEFORE)
    large = grown(small, latent_channels=(5, 4))
    eps = noise(large.config, 3)
    old_eps = [e[:, :c] for e, c in zip(eps, BEFORE.latent_channels, strict=True)]
    x = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(small.sample(old_eps), large.sample(eps), atol=1e-5)
        old, new = (
            small.elbo_terms_with_analytic_kl(x, old_eps)[0],
            large.elbo_terms_with_analytic_kl(x, eps)[0],
        )
    bits = (old.log_weight - new.log_weight) / (BEFORE.num_dims * 0.693)
    assert (bits.abs() < 0.2).all()
    large.elbo_terms_with_analytic_kl(x, eps)[0].log_weight.sum().backward()
    for level, count in zip(large.decoder.levels, BEFORE.latent_channels, strict=True):
        assert level.from_latents.weight.grad[:, count:].abs().max() > 0


@pytest.mark.parametrize("changes", [{"flow_width": 9}, {"flow_couplings": 4}, {"flow_scales": 2}])
def test_what_was_added_learns(changes: dict[str, Any]) -> None:
    large = grown(shaken(BEFORE), **changes)
    optimizer = torch.optim.Adam(large.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in large.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        terms, _ = large.elbo_terms_with_analytic_kl(torch.rand(4, 3, 8, 8), noise(large.config, 4))
        loss = -terms.log_weight.mean()
        loss.backward()
        optimizer.step()
    unchanged = [n for n, p in large.named_parameters() if torch.equal(p, before[n])]
    assert not unchanged


@pytest.mark.parametrize("name", ["latent_channels", "decoder_blocks"])
def test_a_resolution_gets_no_first_latents_or_blocks(name: str) -> None:
    before = dataclasses.replace(BEFORE, **{name: (2, 0)})
    with pytest.raises(ConfigError, match=f"{name} .* cannot become positive .* is 0: .*2, 0"):
        check_growth(before, dataclasses.replace(before, **{name: (2, 1)}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"flow_width": 4}, "flow_width .* may grow, not shrink: 6 to 4"),
        ({"latent_channels": (2, 2)}, "latent_channels .* may grow, not shrink"),
        ({"widths": (16, 8)}, "widths .* must be equal"),
        ({"sigma": "scalar"}, "sigma .* must be equal"),
        ({"image_size": 16}, "image_size .* must be equal: 8 to 16"),
    ],
)
def test_it_refuses_what_is_no_growth(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grown(shaken(BEFORE), **changes)
