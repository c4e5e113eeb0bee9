"""The learned dequantisation: a bijection of positions that makes the bound tighter."""

import dataclasses

import numpy as np
import pytest
import torch

from ade_base.errors import ConfigError
from ade_model.checkpoint import load_model, save_model
from ade_model.dequantizer import Dequantizer
from ade_model.quantization import quantize
from export.graphs import Graphs
from export.parity import make_inputs
from export.to_onnx import export_onnx
from serving.engine.signatures import inputs_of, outputs_of
from tests.helpers import TINY, make_model, narrow, shake
from tests.training_runs import trainer

LEARNED = dataclasses.replace(TINY, dequantizer_width=6)


def images_and_positions(channels=3, n=2):
    generator = torch.Generator().manual_seed(1)
    shape = (n, channels, 4, 4)
    images = torch.randint(0, 256, shape, generator=generator).double()
    return images, torch.rand(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_it_starts_with_uniform_positions(channels):
    images, u = images_and_positions(channels)
    positions, log_det_map = Dequantizer(channels, 5).double()(images, u)
    assert torch.allclose(positions, u, atol=1e-12)
    assert torch.allclose(log_det_map, torch.zeros(2, 4, 4, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_its_log_determinant_is_that_of_its_jacobian(channels):
    dequantizer = shake(Dequantizer(channels, 5), scale=0.1).double()
    images, u = images_and_positions(channels)
    positions, log_det_map = dequantizer(images, u)
    assert not torch.allclose(positions, u, atol=0.01)
    for image, position, log_det in zip(images, u, log_det_map, strict=True):

        def moved(v, image=image):
            return dequantizer(image[None], v[None])[0][0].flatten()

        jacobian = torch.autograd.functional.jacobian(moved, position)
        expected = torch.linalg.slogdet(jacobian.reshape(position.numel(), -1))[1]
        assert log_det.sum().item() == pytest.approx(expected.item(), rel=1e-6)


def test_positions_stay_in_their_bins_for_any_weights():
    dequantizer = shake(Dequantizer(3, 5), scale=30.0)
    images, u = (values.float() for values in images_and_positions())
    for place in (u, torch.zeros_like(u), torch.full_like(u, 1 - 2**-24)):
        positions, log_det_map = dequantizer(images, place)
        assert ((positions >= 0) & (positions <= 1)).all()
        assert torch.isfinite(log_det_map).all()
    positions, _ = Dequantizer(3, 5)(images, u)
    assert torch.equal(quantize((images + positions) / 256), images)


def test_the_bound_counts_its_density():
    model = make_model(LEARNED)
    images = torch.randint(0, 256, (2, 3, 8, 8)).float()
    eps = [torch.randn(2, *shape) for shape in TINY.latent_shapes]
    dequantized = model.dequantize(images, torch.rand(images.shape))
    assert dequantized.log_det_map is not None
    difference = (
        model.elbo_terms(dequantized, eps).log_weight
        - model.elbo_terms(dequantized.x, eps).log_weight
    )
    assert torch.allclose(difference, dequantized.log_det_map.sum((1, 2)), rtol=1e-4, atol=1e-3)
    found = model.examine(dequantized, eps)
    assert torch.allclose(found.cost_nats.sum((1, 2, 3)), -found.terms.log_weight, rtol=1e-4)


def test_it_makes_the_bound_tighter():
    """Trained alone, with a model whose density falls steeply within the bins."""
    torch.manual_seed(0)
    model = make_model(dataclasses.replace(LEARNED, flow_scales=1), scale=0.0)
    assert model.dequantizer is not None
    model.requires_grad_(False)
    model.decoder.log_sigma.fill_(-5.5)
    model.dequantizer.requires_grad_(True)
    images = torch.randint(120, 136, (64, 3, 1, 1)).expand(-1, -1, 8, 8).float()
    eps = [torch.zeros(64, *shape) for shape in TINY.latent_shapes]

    def bound():
        return model.elbo_terms(model.dequantize(images, torch.rand(images.shape)), eps).log_weight

    with torch.no_grad():
        before = torch.stack([bound() for _ in range(20)]).mean()
    optimizer = torch.optim.Adam(model.dequantizer.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (-bound().mean()).backward()
        optimizer.step()
    with torch.no_grad():
        after = torch.stack([bound() for _ in range(20)]).mean()
    assert after > before + 0.05 * TINY.num_dims


def test_a_stored_model_scores_the_same_in_onnx(tmp_path):
    model = make_model(LEARNED)
    save_model(model, tmp_path, {"recipe": "v-ade"})
    model = load_model(tmp_path)
    graphs, names = Graphs(model), inputs_of("score", 2)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    inputs = make_inputs(images, TINY.latent_shapes, names)
    export_onnx(graphs, "score", inputs, tmp_path)
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "score.onnx")
    found = dict(zip(outputs_of("score", 2), session.run(None, inputs), strict=True))
    with torch.no_grad():
        expected = graphs.score(*(torch.from_numpy(inputs[name]) for name in names))
    np.testing.assert_allclose(found["parts"], expected[0], rtol=1e-4, atol=1e-4)


def test_it_needs_an_inference_network():
    with pytest.raises(ConfigError, match="dequantizer_width must be 0 without an inference"):
        dataclasses.replace(LEARNED, encoder=False)
    with pytest.raises(ConfigError, match="dequantizer_width must be an integer of at least 0"):
        dataclasses.replace(TINY, dequantizer_width=-1)


def test_a_training_step_trains_it_with_the_likelihood_alone():
    config = narrow("av-ade", dequantizer_width=4)
    trained = trainer(config)
    dequantizer = trained.model.dequantizer
    assert dequantizer is not None
    rates = {
        id(p): group["lr"] for group in trained.optimizer.param_groups for p in group["params"]
    }
    assert {rates[id(p)] for p in dequantizer.parameters()} == {config.learning_rate}
    before = [p.detach().clone() for p in dequantizer.parameters()]
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    for _ in range(3):  # its last layers start at zero
        losses = trained.run([images, images])
    assert np.isfinite(losses["bpd"])
    assert not any(torch.equal(p, q) for p, q in zip(dequantizer.parameters(), before, strict=True))


def test_encode_sees_what_score_sees_at_the_median_of_the_positions():
    """Otherwise the noise of latents, which is score's, would not give the latents again."""
    graphs = Graphs(make_model(LEARNED, scale=0.05))
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    eps = [torch.randn(2, *shape) for shape in TINY.latent_shapes]
    with torch.no_grad():
        z = graphs.encode(images, *eps)[-len(eps) :]
        noise = graphs.score(images, torch.full(images.shape, 0.5), *eps)[-len(eps) :]
        again = graphs.sample(*noise, torch.zeros(2, 3, 8, 8)).int()
        expected = graphs.decode(*z, torch.zeros(2, 3, 8, 8)).int()
    assert (again - expected).abs().max() <= 1
