"""The model's five verbs: shapes, noise, options and errors."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from ade_base.errors import ConfigError
from ade_model.checkpoint import MIN_HALF, WEIGHTS_NAME, load_model, round_to_half, save_model
from ade_model.config import LATER_FIELDS, ModelConfig
from ade_model.errors import ShapeError
from tests.helpers import TINY, make_model


def noise(model, n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator) for shape in model.config.latent_shapes]


@pytest.mark.parametrize("size", [32, 48, 64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sizes_and_channels(size, channels):
    model = make_model(
        ModelConfig(
            image_size=size,
            channels=channels,
            widths=(8, 8, 8),
            latent_channels=(2, 2, 2),
            flow_couplings=2,
            flow_width=4,
        ),
        scale=0.02,
    )
    x = torch.rand(2, channels, size, size)
    eps = noise(model)
    encoding = model.encode(x, eps)
    assert [tuple(z.shape[1:]) for z in encoding.z] == model.config.latent_shapes
    assert model.config.latent_shapes[-1][1] == size // 2
    for made in (model.sample(eps), model.decode(encoding.z), model.reconstruct(x, eps)):
        assert made.shape == x.shape
    assert model.elbo_terms(x, eps).log_weight.shape == (2,)
    assert model.config.num_dims == channels * size * size


@pytest.mark.parametrize("size", [50, 36, 31])
def test_a_size_that_does_not_fit_is_refused_with_those_that_do(size):
    with pytest.raises(ConfigError, match=rf"multiple of 8 .*such as 32, 48, 64; got {size}"):
        ModelConfig(image_size=size)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"widths": ()}, "latent_channels must have one number"),
        ({"widths": (8, 0, 8)}, "widths must be integers of at least 1"),
        ({"latent_channels": (0, 2, 2)}, "above 0 at the coarsest level"),
        ({"patch": 3}, "patch must be one of 1, 2"),
        ({"flow_mask": "stripes"}, "flow_mask must be one of"),
        (
            {"widths": (), "latent_channels": (), "decoder_blocks": (), "flow_scales": 0},
            "flow_scales must be at least 1 and encoder true",
        ),
        ({"latent_channels": (1, 2)}, "one number per resolution"),
        ({"latent_groups": 0}, "latent_groups must be an integer of at least 1, got 0"),
        ({"latent_groups": 2, "latent_channels": (2, 2, 3)}, r"multiples of latent_groups \(2\)"),
        ({"channels": 0}, "channels must be an integer"),
        ({"flow_scales": -1}, "flow_scales"),
        ({"flow_width": 2.5}, "flow_width"),
        ({"sigma": "two"}, "sigma must be one"),
        ({"flow_max_log_scale": 0.0}, "flow_max_log_scale must be positive"),
        ({"channels": True}, "channels"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"widths": (8, 12)},
        {"latent_channels": (3, 3)},
        {"decoder_blocks": (2, 1)},
        {"sigma": "scalar"},
        {"flow_scales": 0},
        {"flow_scales": 2},
        {"flow_couplings": 3},
        {"flow_blocks": 0},
        {"flow_width": 4},
        {"flow_max_log_scale": 1.5},
    ],
)
def test_every_option_changes_the_model(change):
    """It changes the weights or, if it has none, the answer."""
    base, other = make_model(), make_model(dataclasses.replace(TINY, **change))
    shapes, others = ([tuple(p.shape) for p in model.parameters()] for model in (base, other))
    x, eps = torch.rand(2, 3, 8, 8), noise(base)
    assert shapes != others or not torch.equal(
        base.elbo_terms(x, eps).log_weight, other.elbo_terms(x, eps).log_weight
    )


def test_groups_of_latents_are_levels_and_each_depends_on_those_before():
    two = {"latent_channels": (4, 2), "latent_groups": 2}
    model = make_model(dataclasses.replace(TINY, **two))
    assert model.config.latent_shapes == [(2, 2, 2), (2, 2, 2), (1, 4, 4), (1, 4, 4)]
    x, eps = torch.rand(2, 3, 8, 8), noise(model)
    z, p_y = model.decoder.generate(eps)
    assert torch.equal(model.decoder(z).mean, p_y.mean)
    encoded = model.encoder(model.flow(x)[0])
    draws, p_y = model.decoder.infer(encoded, eps)
    assert torch.equal(model.decoder([draw.z for draw in draws]).mean, p_y.mean)
    for level in range(4):
        changed = [e + (i == level) for i, e in enumerate(eps)]
        priors = [draw.prior.mean for draw in model.decoder.infer(encoded, changed)[0]]
        same = [torch.equal(a, b.prior.mean) for a, b in zip(priors, draws, strict=True)]
        assert same == [i <= level for i in range(4)]
    assert model.elbo_terms(x, eps).log_weight.shape == (2,)


def test_noise_comes_in():
    """The same noise gives the same answer, and the global generator is left alone."""
    model = make_model()
    x = torch.rand(2, 3, 8, 8)
    eps = noise(model)
    y_eps = torch.randn(2, 3, 8, 8)
    state = torch.get_rng_state()
    first, second = (
        [model.sample(eps, y_eps), model.reconstruct(x, eps), model.elbo_terms(x, eps).log_weight]
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_mean_and_density_samples():
    model = make_model()
    eps = noise(model)
    mean = model.sample(eps)
    assert torch.equal(mean, model.sample(eps, torch.zeros(2, 3, 8, 8)))
    assert not torch.equal(mean, model.sample(eps, torch.ones(2, 3, 8, 8)))


def test_decoding_an_encoding_is_the_reconstruction():
    model = make_model()
    x = torch.rand(2, 3, 8, 8)
    eps = noise(model)
    assert torch.allclose(
        model.decode(model.encode(x, eps).z), model.reconstruct(x, eps), atol=1e-5
    )


@pytest.mark.parametrize("bound", [True, False])
def test_a_posterior_is_hardly_wider_than_its_prior(bound):
    """Whatever its network asks for; narrower ones are as asked for."""
    model = make_model(dataclasses.replace(TINY, posterior_bound=bound))
    for level in model.decoder.all_levels:
        half = level.posterior_net[-1].out_channels // 2
        with torch.no_grad():
            level.posterior_net[-1].bias[half:] = torch.linspace(-1, 50, half)
    encoded = model.encoder(model.flow(torch.rand(2, 3, 8, 8))[0])
    for draw in model.decoder.infer(encoded, noise(model))[0]:
        wider = (draw.posterior.log_scale - draw.prior.log_scale).detach()
        assert wider.max() == pytest.approx(1, abs=1e-6) if bound else wider.max() > 2
        assert wider.min() < -0.5


def test_large_weights_of_the_vae_are_stored_in_half_precision_once_rounded(tmp_path):
    model = make_model(
        ModelConfig(image_size=8, widths=(64, 32), latent_channels=(2, 2), decoder_blocks=(1, 1))
    )
    full, rounded = tmp_path / "full", tmp_path / "rounded"
    for folder in (full, rounded):
        folder.mkdir()
        save_model(model, folder, {})
        round_to_half(model)
    assert {v.dtype for v in load_file(full / WEIGHTS_NAME).values()} == {torch.float32}
    stored = load_file(rounded / WEIGHTS_NAME)
    halves = {name for name, value in stored.items() if value.dtype == torch.float16}
    large = {name for name, value in stored.items() if value.numel() >= MIN_HALF}
    assert halves == {name for name in large if name.startswith(("decoder.", "encoder."))} != set()
    for name, value in load_model(rounded).state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, model.state_dict()[name])


def test_a_weight_beyond_half_precision_is_kept():
    model = make_model(
        ModelConfig(image_size=8, widths=(64, 32), latent_channels=(2, 2), decoder_blocks=(1, 1))
    )
    assert model.encoder is not None
    weight = next(p for p in model.encoder.parameters() if p.numel() >= MIN_HALF)
    weight.data[0, 0] = 1e5
    before = weight.detach().clone()
    round_to_half(model)
    assert torch.equal(weight, before)


def test_wrong_shapes_are_named():
    model = make_model()
    x, eps, y_eps = torch.rand(2, 3, 8, 8), noise(model), torch.randn(2, 3, 8, 8)
    with pytest.raises(ShapeError, match=r"x must have .*\(2, 3, 8, 8\), got \(2, 3, 9, 8\)"):
        model.elbo_terms(torch.rand(2, 3, 9, 8), eps)
    with pytest.raises(ShapeError, match=r"eps must have .*\), \(.*, got \(2, 3, 2, 2\)$"):
        model.sample(eps[:1])
    with pytest.raises(ShapeError, match="eps must have .*, got none"):
        model.sample([])
    with pytest.raises(ShapeError, match="z must have .*, got "):
        model.decode([torch.zeros(2, 1, 1, 1), torch.zeros(2, 2, 4, 4)])
    # PyTorch would use the noise of one image for all.
    for wrong in ([eps[0], eps[1][:1]], [eps[0][:1], eps[1]], [e[:1] for e in eps]):
        with pytest.raises(ShapeError, match="eps must have"):
            model.reconstruct(x, wrong)
    for call in (
        lambda noise: model.sample(eps, noise),
        lambda noise: model.decode(eps, noise),
        lambda noise: model.reconstruct(x, eps, noise),
    ):
        call(y_eps)
        for wrong in (y_eps[:1], y_eps[:, :1], y_eps[0]):
            with pytest.raises(ShapeError, match="y_eps must have"):
                call(wrong)
    for wrong in (y_eps[:1], y_eps[..., :1], y_eps[0]):
        with pytest.raises(ShapeError, match="u must have"):
            model.dequantize(x, wrong)
    with pytest.raises(ShapeError, match="images must have"):
        model.dequantize(x[0], x[0])


def test_a_checkpoint_is_enough(tmp_path):
    model = make_model()
    save_model(model, tmp_path, {"recipe": "v-ade"})
    again = load_model(tmp_path)
    assert again.config == model.config
    x, eps = torch.rand(2, 3, 8, 8), noise(model)
    assert torch.equal(model.elbo_terms(x, eps).log_weight, again.elbo_terms(x, eps).log_weight)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        text.replace('"format_version": 1', '"format_version": 99')
    )
    with pytest.raises(ConfigError, match="format_version must be 1, got 99"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(text.replace('"flow_width": 8', '"flow_width": 9'))
    with pytest.raises(ConfigError, match="does not fit"):
        load_model(tmp_path)


FLOW_ALONE = ModelConfig(
    image_size=8,
    widths=(),
    latent_channels=(),
    decoder_blocks=(),
    flow_scales=2,
    flow_couplings=2,
    flow_width=8,
)


def test_a_flow_alone_is_exact():
    model = make_model(FLOW_ALONE).double()
    x = 0.02 + 0.96 * torch.rand(3, 3, 8, 8, dtype=torch.float64)
    eps = [torch.randn(3, 3, 8, 8, dtype=torch.float64)]
    y, log_det = model.flow(x)
    encoding = model.encode(x, eps)
    assert torch.equal(encoding.z[0], y) and torch.equal(
        encoding.posteriors[0].sample(eps[0]).float(), y.float()
    )
    assert (model.reconstruct(x, eps) - x).abs().max() < 1e-9
    assert (model.decode(encoding.z) - x).abs().max() < 1e-9
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = normal.log_prob(y).flatten(1).sum(1) + log_det
    for terms in (model.elbo_terms(x, eps), model.elbo_terms_with_analytic_kl(x, eps)[0]):
        assert torch.allclose(terms.log_weight, expected) and terms.log_prob_y.abs().max() == 0
    assert torch.allclose(model.sample(eps), model.flow.inverse(eps[0]))


def test_levels_without_latents():
    config = ModelConfig(
        image_size=8,
        widths=(8, 8),
        latent_channels=(3, 0),
        decoder_blocks=(0, 1),
        patch=1,
        flow_scales=0,
    )
    model = make_model(config)
    assert config.latent_shapes == [(3, 4, 4)] and config.resolution_sizes == [4, 8]
    eps = [torch.randn(2, 3, 4, 4)]
    x = torch.rand(2, 3, 8, 8)
    encoding = model.encode(x, eps)
    assert len(encoding.z) == 1 and model.decode(encoding.z).shape == x.shape
    assert torch.isfinite(model.elbo_terms(x, eps).log_weight).all()


def test_a_model_without_an_inference_network_can_only_sample():
    model = make_model(
        ModelConfig(
            image_size=8, widths=(8,), latent_channels=(3,), decoder_blocks=(1,), encoder=False
        )
    )
    assert model.config.operations == ("sample",)
    eps = [torch.randn(2, 3, 4, 4)]
    assert model.sample(eps).shape == (2, 3, 8, 8)
    with pytest.raises(ConfigError, match="no inference network"):
        model.encode(torch.rand(2, 3, 8, 8), eps)


def test_models_of_earlier_versions_are_read():
    old = {k: v for k, v in TINY.to_dict().items() if k not in LATER_FIELDS}
    assert ModelConfig.from_dict(old) == dataclasses.replace(TINY, posterior_bound=False)
    with pytest.raises(ConfigError, match="unknown or missing: \\['widths'\\]"):
        ModelConfig.from_dict({k: v for k, v in old.items() if k != "widths"})
    with pytest.raises(ConfigError, match="unknown or missing: \\['depth'\\]"):
        ModelConfig.from_dict({**old, "depth": 3})


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        FLOW_ALONE,
        dataclasses.replace(TINY, posterior_iaf=True),
        dataclasses.replace(TINY, flow_scales=0),
        dataclasses.replace(TINY, flow_scales=2, flow_mask="checkerboard"),
    ],
    ids=["av-ade", "flow alone", "autoregressive posterior", "no flow", "checkerboards"],
)
def test_the_cost_of_pixels_is_the_cost_of_the_image(config):
    model = make_model(config).double()
    x = 0.02 + 0.96 * torch.rand(3, 3, 8, 8, dtype=torch.float64)
    eps = [torch.randn(3, *shape, dtype=torch.float64) for shape in config.latent_shapes]
    found = model.examine(x, eps)
    terms = found.terms
    assert found.cost_nats.shape == (3, 3, 8, 8)
    for part, whole in enumerate((-terms.log_prob_y, -terms.log_det_jacobian, sum(terms.kl))):
        assert torch.allclose(found.cost_nats[:, part].sum((1, 2)), whole, rtol=1e-10, atol=1e-9)
    assert torch.allclose(
        found.cost_nats.sum((1, 2, 3)), -model.elbo_terms(x, eps).log_weight, rtol=1e-12
    )


def test_what_is_left_unexplained():
    """The residuals are standardised by the distributions that should explain them."""
    model = make_model().double()
    x = 0.02 + 0.96 * torch.rand(3, 3, 8, 8, dtype=torch.float64)
    eps = [torch.randn(3, *shape, dtype=torch.float64) for shape in TINY.latent_shapes]
    found = model.examine(x, eps)
    z = model.encode(x, eps).z
    p_y = model.decoder(z)
    assert torch.allclose(found.y, model.flow(x)[0])
    assert torch.allclose(p_y.mean + p_y.log_scale.exp() * found.residual, found.y)
    top = model.decoder.levels[0]
    prior = top.prior(top.start(None, 3))
    assert torch.allclose(prior.mean + prior.log_scale.exp() * found.standardized_z[0], z[0])
    flow = make_model(FLOW_ALONE).double()
    alone = flow.examine(
        x, [torch.randn(3, *s, dtype=torch.float64) for s in FLOW_ALONE.latent_shapes]
    )
    assert torch.equal(alone.standardized_z[0], alone.y) and not alone.residual.any()
