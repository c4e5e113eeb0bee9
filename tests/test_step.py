"""The training step: gradients, losses, clipping and skipped steps."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch

from ade_model.likelihood import ElboTerms
from tests.helpers import narrow, shake
from tests.training_runs import SMALL, batches, trainer
from training.losses import coverage_loss, quality_loss
from training.noise import Noise
from training.step import (
    MAX_RESCUES,
    MAX_SKIPPED_STEPS,
    RECOVERY_STEPS,
    SPIKE,
    TrainingDiverged,
)


def test_likelihood_improves(small_images):
    config = dataclasses.replace(SMALL, discriminator=None, learning_rate=3e-3, warmup_steps=1)
    trained = trainer(config)
    losses = [trained.run(b)["bpd"] for b in batches(small_images, 60, config)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1


def test_both_players_are_trained(small_images):
    trained = trainer()
    before = {name: p.clone() for name, p in trained.model.named_parameters()}
    d_before = [p.clone() for p in trained.adversaries[0].network.parameters()]
    for b in batches(small_images, 3):
        losses = trained.run(b)
    assert set(losses) >= {"bpd", "quality_loss", "d_loss", "grad_norm", "d_grad_norm"}
    assert all(
        not torch.equal(a, b)
        for a, b in zip(d_before, trained.adversaries[0].network.parameters(), strict=True)
    )
    assert sum(
        not torch.equal(before[n], p) for n, p in trained.model.named_parameters()
    ) > 0.8 * len(before)


def gradients_of_one_step(trained, images):
    seen: dict[str, torch.Tensor] = {}

    def look():
        seen.update({n: p.grad.clone() for n, p in trained.model.named_parameters()})

    trained.optimizer.step = look
    trained.run(batches(images, 1)[0])
    return seen


@pytest.mark.parametrize("sees, noisy_share", [(False, 0.0), (False, 0.5), (True, 0.0)])
def test_the_flow_gets_the_likelihood_gradient_alone(small_images, sees, noisy_share):
    """Unless the option says otherwise, L_Q changes the decoder's update, but not the flow's.

    Nor does it change sigma's, even if the discriminator sees the decoder's noise.
    """
    updates = {}
    for weight in (0.0, 50.0):
        config = dataclasses.replace(
            SMALL, quality_weight=weight, flow_sees_quality=sees, noisy_share=noisy_share
        )
        trained = trainer(config)
        updates[weight] = gradients_of_one_step(trained, small_images)
    flow = [n for n in updates[0.0] if n.startswith("flow.")]
    decoder = [n for n in updates[0.0] if n.startswith("decoder.to_mean")]
    assert all(torch.allclose(updates[0.0][n], updates[50.0][n], atol=1e-6) for n in flow) != sees
    sigmas = [updates[weight]["decoder.log_sigma"] for weight in updates]
    assert torch.allclose(*sigmas, atol=1e-6)
    assert not any(torch.allclose(updates[0.0][n], updates[50.0][n], atol=1e-6) for n in decoder)


def test_a_share_of_the_generated_images_has_the_noise_of_the_decoder():
    mean, mixed, noisy = (
        trainer(dataclasses.replace(SMALL, noisy_share=share))._generate(
            32, Noise(0, 0, torch.device("cpu"), 0, 1)
        )
        for share in (0.0, 0.5, 1.0)
    )
    has_noise = [torch.equal(image, its) for image, its in zip(mixed, noisy, strict=True)]
    assert has_noise == [False, True] * 16 and not torch.equal(mean[0], noisy[0])
    expected = torch.where(torch.tensor(has_noise)[:, None, None, None], noisy, mean)
    assert torch.equal(mixed, expected)


def outcome(images, config=SMALL):
    trained = trainer(config)
    for b in batches(images, 4, config):
        trained.run(b, spent=0.6)
    return torch.cat([p.flatten() for p in trained.ema.parameters()])


@pytest.fixture(scope="module")
def unchanged(small_images):
    return outcome(small_images)


# By name; each value is another than that of SMALL.
CHANGES = """
    batch_size=8 learning_rate=0.01 beta1=0.0 beta2=0.5 g_learning_rate=0.01 g_beta1=0.0 g_beta2=0.5
    d_learning_rate=0.01 d_beta1=0.0 d_beta2=0.5 optimizer="adamax" coverage=false warmup_steps=1
    cooldown=0.5 quality_weight=5.0 free_bits=9.0 reconstruction_weight=5.0 flow_sees_quality=true
    gp_weight=10.0 gp_target=1.0 gp_every=2 ema_decay=0.05 clip=0.001 flips=false
    likelihood_share=0.5 likelihood_share=0.5,likelihood_learning_rate=0.01 coverage_batch_size=8
"""


@pytest.mark.parametrize("changes", CHANGES.split())
def test_every_option_changes_the_outcome(small_images, unchanged, changes):
    pairs = (change.split("=") for change in changes.split(","))
    config = dataclasses.replace(SMALL, **{name: json.loads(value) for name, value in pairs})
    assert not torch.equal(unchanged, outcome(small_images, config))


def test_the_likelihood_and_the_generators_path_are_two_groups():
    """Each with its own rate and betas; together they are all weights, each once."""
    for name in ("v-ade", "av-ade", "av-ade-iaf-rd", "gan", "real-nvp", "flow-gan-h"):
        trained = trainer(narrow(name))
        names = {p: n for n, p in trained.model.named_parameters()}
        groups = [{names[p] for p in group["params"]} for group in trained.optimizer.param_groups]
        assert sorted(n for group in groups for n in group) == sorted(names.values())
        rates = [(group["lr"], group["betas"]) for group in trained.optimizer.param_groups]
        of_likelihood = (trained.config.learning_rate, (0.9, 0.999))
        of_path = (trained.config.g_learning_rate, (0.5, 0.99))
        if name in ("v-ade", "real-nvp"):
            assert rates == [of_likelihood]
        elif name == "flow-gan-h":
            assert rates == [of_path]
        else:
            assert rates == [of_likelihood, of_path]
            likelihood, path = groups
            own = re.compile(r"flow\.|encoder\.|.*\.(posterior_net|iaf)\.|decoder\.log_sigma$")
            assert all(map(own.match, likelihood)) and not any(map(own.match, path))
            assert any(".prior_net." in n for n in path) and any("to_mean" in n for n in path)


def test_gradients_are_clipped_against_their_usual_norm(small_images):
    config = dataclasses.replace(SMALL, discriminator=None, warmup_steps=0, clip=4.0)
    (batch,) = batches(small_images, 1, config)

    def applied(usual):
        """Norms of one step's gradient before and after clipping, and the usual norm afterwards."""
        trained = trainer(config)
        trained.usual_norm["model"] = usual
        seen: list[torch.Tensor] = []
        trained.optimizer.step = lambda: seen.extend(
            p.grad.flatten() for p in trained.model.parameters() if p.grad is not None
        )
        norm = trained.run(batch)["grad_norm"]
        return norm, torch.cat(seen).norm().item(), trained.usual_norm["model"]

    norm, first, usual = applied(0.0)
    assert first == pytest.approx(norm, rel=1e-4) and usual == pytest.approx(norm, rel=1e-4)
    # Nearly four times the usual length: unchanged.
    assert applied(norm / 3.9)[1] == pytest.approx(norm, rel=1e-4)
    _, kept, after = applied(norm / 6)
    assert kept == pytest.approx(4 * norm / 6, rel=1e-4) and after == pytest.approx(
        (0.95 + 0.05 * 4) * norm / 6, rel=1e-4
    )
    # What would be skipped later is not in the first steps, whose norms are not usual yet.
    assert applied(norm / (2 * SPIKE))[1] == pytest.approx(4 * norm / (2 * SPIKE), rel=1e-4)


def test_a_penalty_weighs_as_much_however_seldom_it_is_computed(small_images, monkeypatch):
    (batch,) = batches(small_images, 1)
    each, every_second = (
        trainer(dataclasses.replace(SMALL, gp_weight=weight, gp_every=every)).run(batch)
        for weight, every in ((20.0, 1), (10.0, 2))
    )
    assert each["d_grad_norm"] == pytest.approx(every_second["d_grad_norm"], rel=1e-6)
    # Nor is it clipped more often for being seldom.
    trained = trainer(dataclasses.replace(SMALL, gp_weight=10.0, gp_every=2, warmup_steps=0))
    weights, applied = list(trained.adversaries[0].network.parameters()), []

    def step():
        gradients = [p.grad.flatten() for p in weights if p.grad is not None]
        applied.append(torch.cat(gradients).norm().item())

    monkeypatch.setattr(trained.adversaries[0].optimizer, "step", step)
    found = [trained.run(batch) for _ in range(80)]
    kept = [size / its["d_grad_norm"] for size, its in zip(applied, found, strict=True)]
    of_penalty = [
        share for share, its in zip(kept, found, strict=True) if "gradient_penalty" in its
    ]
    assert np.mean(of_penalty[10:]) > 0.9


def test_one_batch_of_samples_serves_both_players(small_images):
    """The generator learns from the updated discriminator, on the samples of its step."""
    config = dataclasses.replace(SMALL, coverage=False, quality_weight=1.0)
    trained = trainer(config)
    drawn: list[list[torch.Tensor]] = []
    sample = trained.model.sample
    trained.model.sample = lambda eps, y_eps: drawn.append(eps) or sample(eps, y_eps)  # type: ignore[method-assign,func-returns-value]
    found: dict[str, torch.Tensor] = {}
    trained.optimizer.step = lambda: found.update(
        (n, p.grad.clone()) for n, p in trained.model.named_parameters() if p.grad is not None
    )
    trained.run(batches(small_images, 1, config)[0])
    assert len(drawn) == 1 and found and not any(n.startswith("flow.") for n in found)
    quality_loss(trained.adversaries[0].network(sample(drawn[-1]))).backward()
    assert all(
        torch.allclose(p.grad, found[n], atol=1e-7)
        for n, p in trained.model.named_parameters()
        if n in found
    )


def test_two_adversaries_train_alone_first_then_the_generator_learns_from_both(real_images):
    config = dataclasses.replace(narrow("flagship", image_size=32), alone_steps=2, warmup_steps=2)
    trained = trainer(config)
    (alone,) = trained.batch_sizes
    trained.begin_joint()
    assert (alone, trained.batch_sizes) == (16, [16, 16])
    names = {"d_loss", "logit_real", "d_grad_norm", "d_skipped"}
    weights = trained.model.decoder.to_mean[1].weight
    shares, seen = [], []
    for batch in batches(real_images, 5, config):
        shares.append(trained._quality_share)
        before = [next(its.network.parameters()).clone() for its in trained.adversaries]
        losses = trained.run(batch)
        assert losses.keys() >= names | {f"pixel_{name}" for name in names} | {"bpd"}
        seen.append({"quality_loss", "pixel_quality_loss"} & losses.keys())
        after = [next(its.network.parameters()) for its in trained.adversaries]
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert shares == [0, 0, 0.5, 1, 1] and list(map(len, seen)) == [0, 0, 2, 2, 2]
    # L_Q is the mean of the two, and each reaches the generator.
    noise = Noise(0, 9, torch.device("cpu"), 0, 1)
    shown = trained._augmented(trained._generate(4, noise), noise)
    features = [its.network.features_of(shown) for its in trained.adversaries]
    objective, _ = trained._quality_objective(features)
    alone = [
        quality_loss(its.network.judge(levels))
        for its, levels in zip(trained.adversaries, features, strict=True)
    ]
    both, projected, pixels = (
        torch.autograd.grad(loss, weights, retain_graph=True)[0] for loss in (objective, *alone)
    )
    assert projected.any() and pixels.any()
    assert torch.allclose(both, 0.05 / 2 * (projected + pixels), rtol=1e-3, atol=1e-7)


def test_reconstructions_train_the_whole_model(small_images):
    gradients = {}
    for weight in (0.0, 100.0):
        trained = trainer(dataclasses.replace(SMALL, reconstruction_weight=weight))
        shake(trained.model)
        gradients[weight] = gradients_of_one_step(trained, small_images)
        losses = trained.run(batches(small_images, 1)[0])
        assert ("reconstruction_error" in losses) == (weight > 0)
    changed = {
        name.split(".")[0]
        for name, gradient in gradients[0.0].items()
        if not torch.allclose(gradient, gradients[100.0][name], atol=1e-6)
    }
    assert {"flow", "encoder", "decoder"} <= changed
    # The flow learns through its inverse, which makes the reconstructions.
    features = torch.randn(2, 3, 8, 8, requires_grad=True)
    trained.model.zero_grad()
    trained._reconstruction_error(features, torch.rand(2, 3, 8, 8)).backward()
    assert features.grad is not None and features.grad.abs().max() > 0
    assert any(
        p.grad is not None and p.grad.abs().max() > 0 for p in trained.model.flow.parameters()
    )


def test_the_kl_is_reported_by_level(small_images):
    config = dataclasses.replace(SMALL, discriminator=None)
    trained, plain = trainer(config), trainer(dataclasses.replace(config, free_bits=1.0))
    shake(trained.model)
    plain.model.load_state_dict(trained.model.state_dict())
    (batch,) = batches(small_images, 1, config)
    terms: list[ElboTerms] = []
    infer = trained.model.elbo_terms_with_analytic_kl

    def watched(x, eps):
        found = infer(x, eps)
        terms.append(found[0])
        return found

    trained.model.elbo_terms_with_analytic_kl = watched  # type: ignore[method-assign]
    losses = trained.run(batch)
    dims = config.model.num_dims * math.log(2)
    assert [losses[f"kl_{i}"] for i in range(2)] == pytest.approx(
        [kl.mean().item() / dims for kl in terms[0].kl]
    )
    assert losses["bpd"] == pytest.approx(
        coverage_loss(terms[0], config.model.num_dims).item(), abs=1e-6
    )
    # The bound itself, without free bits.
    assert plain.run(batch)["bpd"] == pytest.approx(losses["bpd"], abs=1e-6)


def test_the_benchmark_compiles_the_methods_that_training_calls(small_images, monkeypatch):
    called: set[str] = set()

    def watched(method):
        return lambda *inputs: (called.add(method.__name__), method(*inputs))[1]

    monkeypatch.setattr(torch, "compile", watched)
    benchmark = pytest.importorskip("benchmarks.training")
    benchmark._compiled(trainer(SMALL)).run(*batches(small_images, 1))
    assert called == {"elbo_terms_with_analytic_kl", "sample"}


def test_losses_that_are_not_finite_stop_the_run(small_images):
    trained = trainer()
    (batch,) = batches(small_images, 1)
    with torch.no_grad():
        trained.model.decoder.log_sigma.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="must be finite, got .*bpd"):
        trained.run(batch)


def test_a_gradient_that_is_not_finite_is_counted_and_has_no_norm(small_images):
    """JSON has no number for it, and metrics.jsonl would be invalid."""
    trained = trainer(dataclasses.replace(SMALL, discriminator=None))
    (batch,) = batches(small_images, 1, dataclasses.replace(SMALL, discriminator=None))
    assert trained.run(batch)["skipped"] == 0
    trained.average = lambda flat: torch.cat([flat[:3], flat[3:] * math.inf])
    losses = trained.run(batch)
    assert losses["skipped"] == 1 and "grad_norm" not in losses
    assert json.loads(json.dumps(losses, allow_nan=False)) == losses


@pytest.mark.parametrize("decay", [SMALL.ema_decay, 0.9])
def test_an_outlier_is_skipped_then_the_average_takes_over_then_the_run_stops(small_images, decay):
    trained = trainer(dataclasses.replace(SMALL, discriminator=None, ema_decay=decay))
    (batch,) = batches(small_images, 1, dataclasses.replace(SMALL, discriminator=None))
    trained.run(batch)
    trained.step = 100
    trained.usual_norm["model"] = 1e-9
    shake(trained.model)
    before = [p.clone() for p in trained.model.parameters()]
    average = [p.clone() for p in trained.ema.parameters()]
    for i in range(MAX_SKIPPED_STEPS - 1):
        assert trained.run(batch)["skipped"] == i + 1
    assert all(torch.equal(a, b) for a, b in zip(before, trained.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(average, trained.ema.parameters(), strict=True))
    trained.run(batch)
    assert all(torch.equal(a, b) for a, b in zip(average, trained.model.parameters(), strict=True))
    assert trained.rescued_at == [100 + MAX_SKIPPED_STEPS - 1]
    assert not trained.optimizer.state  # it is of the weights that were given up
    trained.usual_norm["model"] = 1e9
    assert trained.run(batch)["skipped"] == MAX_SKIPPED_STEPS
    assert trained.optimizer.param_groups[0]["lr"] == pytest.approx(
        SMALL.learning_rate / SMALL.warmup_steps, rel=0.01
    )
    for steps, share in (
        (SMALL.warmup_steps, 0.5),
        (RECOVERY_STEPS // 2, 0.5**0.5),
        (RECOVERY_STEPS, 1.0),
    ):
        trained.step = trained.rescued_at[0] + steps  # the rate comes back
        assert trained._rate_share("model") == pytest.approx(share, rel=0.05)
    trained.step = 200
    trained.usual_norm["model"] = 1e-9
    shake(trained.model)
    with pytest.raises(TrainingDiverged, match=f"{MAX_SKIPPED_STEPS} steps in a row"):
        for _ in range(MAX_RESCUES * MAX_SKIPPED_STEPS):
            trained.run(batch)


def test_the_inference_network_is_trained_around_a_frozen_generator(small_images):
    config = narrow("gan")
    trained = trainer(config)
    for b in batches(small_images, 3, config):
        assert "bpd" not in trained.run(b)
    assert trained.operations == ("sample",)
    generator = {n: p.clone() for n, p in trained.ema.named_parameters()}
    noise = [torch.randn(4, *shape) for shape in config.model.latent_shapes]
    samples = trained.ema.sample(noise)
    trained.begin_inference()
    assert trained.usual_norm["model"] == 0  # that of another loss
    for b in batches(small_images, 3, config):
        losses = trained.run(b)
        assert "bpd" in losses and "d_loss" not in losses
    assert "score" in trained.operations and torch.allclose(
        trained.ema.sample(noise), samples, atol=1e-6
    )
    changed = {n for n, p in trained.ema.named_parameters() if not torch.equal(p, generator[n])}
    assert "decoder.log_sigma" in changed and any(n.startswith("encoder.") for n in changed)
    assert all(
        n.startswith("encoder.") or "posterior" in n or n == "decoder.log_sigma" for n in changed
    )
