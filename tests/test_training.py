"""Small training runs: learning, exact resumption, kill -9 and several processes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from ade_base.errors import ConfigError
from ade_base.files import LOCK
from ade_base.ports import free_ports
from ade_cli.data_options import dataset_of, dataset_of_run
from ade_cli.evaluate import _store
from ade_cli.main import VERBS, main
from ade_cli.recipe_changes import FIXED, fields
from ade_model.bijections import CheckerboardCoupling
from ade_model.checkpoint import load_model, read_config, save_model
from ade_model.config import ModelConfig
from ade_model.layers import ResidualBlock
from ade_model.likelihood import ElboTerms
from ade_model.model import ADEModel
from export.write import ExportError, evaluation_of, export_bundle
from serving.engine.bundle import verify_bundle
from tests.helpers import (
    ROOT,
    TINY,
    held_by_another,
    interrupt_after,
    make_folder,
    narrow,
    shake,
)
from tests.test_docs import ade_commands
from training.config import SIZES, DiscriminatorConfig, TrainConfig
from training.data import DataError, Dataset, ImageSet
from training.datasets import load_dataset
from training.datasets.files import part_of
from training.device import choose_device
from training.discriminator import Discriminator
from training.loop import _check_alike, _with_others, train
from training.losses import (
    coverage_loss,
    discriminator_loss,
    gradient_penalty,
    latent_surcharge,
    quality_loss,
)
from training.recipes import recipe, recipe_names
from training.run_options import NO_LIMIT, RunOptions
from training.run_start import (
    WRITTEN,
    check_folder,
    check_start,
    last_options,
    open_run,
    read_started,
)
from training.runs import (
    Progress,
    RunError,
    checkpoint_folders,
    latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
    write_json,
)
from training.step import (
    LAST_RATE,
    MAX_RESCUES,
    MAX_SKIPPED_STEPS,
    RECOVERY_STEPS,
    SPIKE,
    Trainer,
    TrainingDiverged,
    _Noise,
)
from training.weights import count_weights

SMALL = dataclasses.replace(
    recipe("av-ade", 8, 3),
    model=TINY,
    discriminator=DiscriminatorConfig(widths=(8, 8)),
    batch_size=16,
)


def trainer(config: TrainConfig = SMALL, seed: int = 0) -> Trainer:
    return Trainer(config, torch.device("cpu"), nullcontext, lambda flat: flat, seed)


def batches(
    images: np.ndarray, steps: int, config: TrainConfig = SMALL
) -> list[list[torch.Tensor]]:
    source = ImageSet(images).batches(config.batch_size, 0)
    count = 2 if config.discriminator else 1
    return [[torch.from_numpy(next(source)) for _ in range(count)] for _ in range(steps)]


def test_likelihood_improves(small_images: np.ndarray) -> None:
    config = dataclasses.replace(SMALL, discriminator=None, learning_rate=3e-3, warmup_steps=1)
    trained = trainer(config)
    losses = [trained.run(b)["bpd"] for b in batches(small_images, 60, config)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1


def test_both_players_are_trained(small_images: np.ndarray) -> None:
    trained = trainer()
    before = {name: p.clone() for name, p in trained.model.named_parameters()}
    assert trained.discriminator is not None
    d_before = [p.clone() for p in trained.discriminator.parameters()]
    for b in batches(small_images, 3):
        losses = trained.run(b)
    assert set(losses) >= {"bpd", "quality_loss", "d_loss", "grad_norm", "d_grad_norm"}
    assert all(
        not torch.equal(a, b)
        for a, b in zip(d_before, trained.discriminator.parameters(), strict=True)
    )
    assert sum(
        not torch.equal(before[n], p) for n, p in trained.model.named_parameters()
    ) > 0.8 * len(before)


def gradients_of_one_step(trained: Trainer, images: np.ndarray) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}

    def look() -> None:
        seen.update({n: p.grad.clone() for n, p in trained.model.named_parameters()})

    trained.optimizer.step = look
    trained.run(batches(images, 1)[0])
    return seen


@pytest.mark.parametrize("sees, noisy_share", [(False, 0.0), (False, 0.5), (True, 0.0)])
def test_the_flow_gets_the_likelihood_gradient_alone(
    small_images: np.ndarray, sees: bool, noisy_share: float
) -> None:
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


def test_a_share_of_the_generated_images_has_the_noise_of_the_decoder() -> None:
    mean, mixed, noisy = (
        trainer(dataclasses.replace(SMALL, noisy_share=share))._generate(
            32, _Noise(0, 0, torch.device("cpu"), 0, 1)
        )
        for share in (0.0, 0.5, 1.0)
    )
    has_noise = [torch.equal(image, its) for image, its in zip(mixed, noisy, strict=True)]
    assert has_noise == [False, True] * 16 and not torch.equal(mean[0], noisy[0])
    expected = torch.where(torch.tensor(has_noise)[:, None, None, None], noisy, mean)
    assert torch.equal(mixed, expected)


@pytest.mark.parametrize("share", [0.5, 0.3, 1.0])
def test_noisy_images_are_those_of_the_whole_batch(share: float) -> None:
    """Whatever the number of processes that share it, down to one image each."""
    one = trainer(dataclasses.replace(SMALL, noisy_share=share))
    whole = one._noisy(8)
    assert int(whole.sum()) == int(8 * share)
    for processes in (2, 8):
        shares = []
        for one.rank in range(processes):
            shares.append(one._noisy(8 // processes))
        assert torch.equal(torch.cat(shares), whole)


def outcome(images: np.ndarray, config: TrainConfig = SMALL) -> torch.Tensor:
    trained = trainer(config)
    for b in batches(images, 4, config):
        trained.run(b, spent=0.6)
    return torch.cat([p.flatten() for p in trained.ema.parameters()])


@pytest.fixture(scope="module")
def unchanged(small_images: np.ndarray) -> torch.Tensor:
    return outcome(small_images)


# By name; each value is another than that of SMALL.
CHANGES = """
    batch_size=8 learning_rate=0.01 beta1=0.0 beta2=0.5 g_learning_rate=0.01 g_beta1=0.0 g_beta2=0.5
    d_learning_rate=0.01 d_beta1=0.0 d_beta2=0.5 optimizer="adamax" coverage=false warmup_steps=1
    cooldown=0.5 quality_weight=5.0 free_bits=9.0 reconstruction_weight=5.0 flow_sees_quality=true
    gp_weight=10.0 gp_target=1.0 gp_every=2 ema_decay=0.05 clip=0.001 flips=false
    likelihood_share=0.5 likelihood_share=0.5,likelihood_learning_rate=0.01
"""


@pytest.mark.parametrize("changes", CHANGES.split())
def test_every_option_changes_the_outcome(
    small_images: np.ndarray, unchanged: torch.Tensor, changes: str
) -> None:
    pairs = (change.split("=") for change in changes.split(","))
    config = dataclasses.replace(SMALL, **{name: json.loads(value) for name, value in pairs})
    assert not torch.equal(unchanged, outcome(small_images, config))


def test_the_likelihood_and_the_generators_path_are_two_groups() -> None:
    """Each with its own rate and betas; together they are all weights, each once."""
    for name in ("v-ade", "av-ade", "av-ade-iaf-rd", "gan", "real-nvp", "flow-gan-h"):
        trained = trainer(narrow(name))
        names = {p: n for n, p in trained.model.named_parameters()}
        groups = [{names[p] for p in group["params"]} for group in trained.optimizer.param_groups]
        assert sorted(n for group in groups for n in group) == sorted(names.values())
        if name in ("v-ade", "real-nvp"):
            assert len(groups) == 1 and trained.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
        elif name == "flow-gan-h":
            assert len(groups) == 1 and trained.optimizer.param_groups[0]["betas"] == (0.5, 0.99)
        else:
            likelihood, path = groups
            assert all(
                n.startswith(("flow.", "encoder."))
                or ".posterior_net." in n
                or ".iaf." in n
                or n == "decoder.log_sigma"
                for n in likelihood
            )
            assert any(".prior_net." in n for n in path) and any("to_mean" in n for n in path)
            assert not any(n.startswith(("flow.", "encoder.")) for n in path)
            assert [group["betas"] for group in trained.optimizer.param_groups] == [
                (0.9, 0.999),
                (0.5, 0.99),
            ]
            assert [group["lr"] for group in trained.optimizer.param_groups] == [
                trained.config.learning_rate,
                trained.config.g_learning_rate,
            ]


def test_gradients_are_clipped_against_their_usual_norm(small_images: np.ndarray) -> None:
    config = dataclasses.replace(SMALL, discriminator=None, warmup_steps=0, clip=4.0)
    (batch,) = batches(small_images, 1, config)

    def applied(usual: float) -> tuple[float, float, float]:
        """Norms of one step's gradient before and after clipping, and the usual norm afterwards."""
        trained = trainer(config)
        trained.usual_norm["model"] = usual
        seen: list[float] = []
        trained.optimizer.step = lambda: seen.append(
            torch.cat(
                [  # type: ignore[method-assign]
                    p.grad.flatten() for p in trained.model.parameters() if p.grad is not None
                ]
            )
            .norm()
            .item()
        )
        norm = trained.run(batch)["grad_norm"]
        return norm, seen[0], trained.usual_norm["model"]

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


def test_a_penalty_weighs_as_much_however_seldom_it_is_computed(
    small_images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch,) = batches(small_images, 1)
    each, every_second = (
        trainer(dataclasses.replace(SMALL, gp_weight=weight, gp_every=every)).run(batch)
        for weight, every in ((20.0, 1), (10.0, 2))
    )
    assert each["d_grad_norm"] == pytest.approx(every_second["d_grad_norm"], rel=1e-6)
    # Nor is it clipped more often for being seldom.
    trained = trainer(dataclasses.replace(SMALL, gp_weight=10.0, gp_every=2, warmup_steps=0))
    assert trained.discriminator is not None and trained.d_optimizer is not None
    weights, applied = list(trained.discriminator.parameters()), []

    def step() -> None:
        gradients = [p.grad.flatten() for p in weights if p.grad is not None]
        applied.append(torch.cat(gradients).norm().item())

    monkeypatch.setattr(trained.d_optimizer, "step", step)
    found = [trained.run(batch) for _ in range(80)]
    kept = [size / its["d_grad_norm"] for size, its in zip(applied, found, strict=True)]
    of_penalty = [
        share for share, its in zip(kept, found, strict=True) if "gradient_penalty" in its
    ]
    assert np.mean(of_penalty[10:]) > 0.9


def test_one_batch_of_samples_serves_both_players(small_images: np.ndarray) -> None:
    """The generator learns from the updated discriminator, on the samples of its step."""
    config = dataclasses.replace(SMALL, coverage=False, quality_weight=1.0)
    trained = trainer(config)
    drawn: list[list[torch.Tensor]] = []
    sample = trained.model.sample
    trained.model.sample = lambda eps, y_eps: drawn.append(eps) or sample(eps, y_eps)  # type: ignore[method-assign,func-returns-value]
    found: dict[str, torch.Tensor] = {}
    trained.optimizer.step = lambda: found.update(
        {  # type: ignore[method-assign]
            n: p.grad.clone() for n, p in trained.model.named_parameters() if p.grad is not None
        }
    )
    trained.run(batches(small_images, 1, config)[0])
    assert len(drawn) == 1 and found and not any(n.startswith("flow.") for n in found)
    assert trained.discriminator is not None
    quality_loss(trained.discriminator(sample(drawn[-1]))).backward()
    assert all(
        torch.allclose(p.grad, found[n], atol=1e-7)
        for n, p in trained.model.named_parameters()
        if n in found
    )


def test_free_bits_charge_only_what_exceeds_them() -> None:
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


def test_reconstructions_train_the_whole_model(small_images: np.ndarray) -> None:
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


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_the_reconstructions_of_one(processes: int) -> None:
    """The first images of the whole batch are reconstructed, whoever has them."""
    config = dataclasses.replace(SMALL, reconstruction_weight=1.0)
    features, x = torch.randn(12, 3, 8, 8), torch.rand(12, 3, 8, 8)

    def error(rank: int, processes: int) -> torch.Tensor:
        it = trainer(config)
        it.rank, it.processes = rank, processes
        shares = (values.chunk(processes)[rank] for values in (features, x))
        return it._reconstruction_error(*shares)

    every = torch.stack([error(rank, processes) for rank in range(processes)])
    assert every.mean().item() == pytest.approx(error(0, 1).item(), rel=1e-5)


def test_the_kl_is_reported_by_level(small_images: np.ndarray) -> None:
    config = dataclasses.replace(SMALL, discriminator=None)
    trained, plain = trainer(config), trainer(dataclasses.replace(config, free_bits=1.0))
    shake(trained.model)
    plain.model.load_state_dict(trained.model.state_dict())
    (batch,) = batches(small_images, 1, config)
    terms: list[ElboTerms] = []
    infer = trained.model.elbo_terms_with_analytic_kl

    def watched(x: torch.Tensor, eps: list[torch.Tensor]) -> tuple[ElboTerms, torch.Tensor]:
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


def test_the_benchmark_compiles_the_methods_that_training_calls(
    small_images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: set[str] = set()

    def watched(method: Any) -> Any:
        return lambda *inputs: (called.add(method.__name__), method(*inputs))[1]

    monkeypatch.setattr(torch, "compile", watched)
    benchmark = pytest.importorskip("benchmarks.training")
    benchmark._compiled(trainer(SMALL)).run(*batches(small_images, 1))
    assert called == {"elbo_terms_with_analytic_kl", "sample"}


def test_rates_fall_in_the_last_part_of_a_budget(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For budgets of images and of minutes; a larger budget restores them until its last part."""
    shares: list[float] = []
    run = Trainer.run

    def look(self: Trainer, drawn: list[torch.Tensor], spent: float = 0.0) -> dict[str, float]:
        losses = run(self, drawn, spent)
        shares.append(round(self.optimizer.param_groups[0]["lr"] / self.config.learning_rate, 3))
        return losses

    def shares_of(name: str, out: str, images: int, **more: Any) -> list[float]:
        shares.clear()
        options = RunOptions(images, device="cpu", precision="float32", **more)
        config = dataclasses.replace(narrow(name), warmup_steps=0, cooldown=0.4)
        if name == "gan":
            config = dataclasses.replace(config, inference_share=1.0)
        resume = (tmp_path / out).exists()
        train(config, dataset, tmp_path / out, options, resume)
        return shares

    monkeypatch.setattr(Trainer, "run", look)
    dataset = load_dataset(str(folder), None, 8)
    falling = [0.8775, 0.755, 0.6325, 0.51, 0.3875, 0.265, 0.1425]
    assert shares_of("v-ade", "run", 160) == [1.0] * 7 + falling[1::2]
    assert shares_of("v-ade", "run", 320) == pytest.approx([1.0] * 3 + falling, abs=1e-3)
    assert shares_of("gan", "gan", 160) == 2 * ([1.0] * 7 + falling[1::2])  # each phase has its own
    timed = shares_of("v-ade", "timed", 10**9, minutes=0.02)
    assert timed[0] == 1.0 and timed == sorted(timed, reverse=True)
    assert LAST_RATE <= timed[-1] < 0.5


PHASES = {"likelihood_share": 0.5, "likelihood_batch_size": 8, "likelihood_learning_rate": 2e-3}


def test_the_likelihood_alone_then_both_then_lower_rates(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one run, whose budget in images decides each step; minutes become images at its start."""
    seen: list[tuple[int, bool, float, float]] = []
    run = Trainer.run

    def look(self: Trainer, drawn: list[torch.Tensor], spent: float = 0.0) -> dict[str, float]:
        losses = run(self, drawn, spent)
        rate, weight = self.optimizer.param_groups[1]["lr"], self._quality_weight
        seen.append((len(drawn[-1]), "d_loss" in losses, round(rate, 6), round(weight, 4)))
        return losses

    monkeypatch.setattr(Trainer, "run", look)
    dataset = load_dataset(str(folder), None, 8)
    config = dataclasses.replace(narrow("av-ade"), warmup_steps=2, cooldown=0.25, **PHASES)
    options = RunOptions(images=16 * 8, device="cpu", precision="float32")
    progress = train(config, dataset, tmp_path / "run", options, resume=False)
    g = config.g_learning_rate
    assert seen[:8] == [(8, False, rate, 0.05) for rate in (1e-3, *[2e-3] * 7)]
    assert [line[:2] for line in seen[8:]] == [(16, True)] * 4
    assert [line[2] for line in seen[8:]] == pytest.approx([g, g, g * 0.673, g * 0.347], abs=1e-6)
    assert [line[3] for line in seen[8:]] == [0.05, 0.05, 0.05, 0.05]
    assert (progress.step, progress.images) == (12, 128)
    # The end of the first phase is kept, to fall back on.
    assert [path.name for path in checkpoint_folders(tmp_path / "run")] == [
        "step-000000008",
        "step-000000012",
    ]
    timed = dataclasses.replace(options, images=10**9, minutes=0.01)
    train(config, dataset, tmp_path / "timed", timed, resume=False)
    resolved = read_started(tmp_path / "timed")["options"]
    assert resolved["minutes"] == 0.01 and 16 <= resolved["images"] < 10**6
    state = read_state(latest_checkpoint(tmp_path / "timed"))
    assert state["joint_since"] == round(resolved["images"] / 2 / 8)


def test_a_flagship_that_is_killed_and_resumed_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In each phase: all that a step depends on is in the checkpoint.

    The recipe's own settings, with narrow networks: 8 steps of likelihood alone, then 6 joint ones.
    """
    arguments = ["train", "flagship", "--data", str(folder), "--image-size", "8", "--size", "tiny"]
    arguments += [*NARROW, "widths=16,16,16", "flow_width=16"]
    whole, cut, resume = tmp_path / "whole", tmp_path / "cut", list[str]()
    once = ["--images", "320", "--checkpoint-steps", "1", "--precision", "bfloat16"]  # are kept
    assert main([*arguments, *once, "--out", str(whole)]) == 0
    for step in (3, 8, 10):
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "ade_cli.main",
                *arguments,
                "--out",
                str(cut),
                *(resume or once),
            ],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not (cut / "checkpoints" / f"step-{step:09d}").exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        resume = ["--resume"]
    for words, message in (
        ([], "with --resume"),
        (["--resume", "--set", "quality_weight=3"], "started with quality_weight 0.05, now 3.0"),
        (["--resume", "--seed", "3"], "--seed must be that of the run, 0, with"),
    ):
        assert main([*arguments, "--out", str(cut), *words]) == 2
        assert message in capsys.readouterr().err
    assert main([*arguments, "--out", str(cut), "--resume"]) == 0
    assert losses_of(cut) == losses_of(whole) and list(losses_of(whole)) == [1, 10]
    assert read_state(latest_checkpoint(whole))["joint_since"] == 8
    paths = sorted(latest_checkpoint(whole).glob("*.safetensors"))
    assert len(paths) == 5 and latest_checkpoint(whole).name == "step-000000014"
    for path in paths:
        assert path.read_bytes() == (latest_checkpoint(cut) / path.name).read_bytes(), path.name


def test_an_interruption_waits_for_its_step_and_saves_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, run = load_dataset(str(folder), None, 8), tmp_path / "run"
    options = RunOptions(images=16 * 10, device="cpu", precision="float32")
    whole_step, fails = Trainer.run, False

    def interrupted(self: Trainer, *given: Any) -> dict[str, float]:
        if fails or self.step % 3 == 2:
            signal.raise_signal(signal.SIGINT)
        losses = whole_step(self, *given)
        if fails:
            raise RuntimeError
        return losses

    monkeypatch.setattr(Trainer, "run", interrupted)
    for resume, step in ((False, 3), (True, 6)):
        with pytest.raises(KeyboardInterrupt):
            train(narrow("vae"), dataset, run, options, resume)
        assert latest_checkpoint(run).name == f"step-{step:09d}"
    fails = True  # what it leaves is not saved
    with pytest.raises(KeyboardInterrupt):
        train(narrow("vae"), dataset, run, options, resume=True)
    assert latest_checkpoint(run).name == "step-000000006"
    # A copy is kept by hand, because only three checkpoints stay.
    kept = shutil.copytree(latest_checkpoint(run), run / "checkpoints" / "step-000000006-best")
    assert latest_checkpoint(run).name == "step-000000006" and latest_checkpoint(kept) == kept


def test_losses_that_are_not_finite_stop_the_run(small_images: np.ndarray) -> None:
    trained = trainer()
    (batch,) = batches(small_images, 1)
    with torch.no_grad():
        trained.model.decoder.log_sigma.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="must be finite, got .*bpd"):
        trained.run(batch)


def test_a_gradient_that_is_not_finite_is_counted_and_has_no_norm(
    small_images: np.ndarray,
) -> None:
    """JSON has no number for it, and metrics.jsonl would be invalid."""
    trained = trainer(dataclasses.replace(SMALL, discriminator=None))
    (batch,) = batches(small_images, 1, dataclasses.replace(SMALL, discriminator=None))
    assert trained.run(batch)["skipped"] == 0
    trained.average = lambda flat: torch.cat([flat[:3], flat[3:] * math.inf])
    losses = trained.run(batch)
    assert losses["skipped"] == 1 and "grad_norm" not in losses
    assert json.loads(json.dumps(losses, allow_nan=False)) == losses


@pytest.mark.parametrize("decay", [SMALL.ema_decay, 0.9])
def test_an_outlier_is_skipped_then_the_average_takes_over_then_the_run_stops(
    small_images: np.ndarray, decay: float
) -> None:
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


def test_the_inference_network_is_trained_around_a_frozen_generator(
    small_images: np.ndarray,
) -> None:
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


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("av-ade", {"gp_every": 0}, "gp_every must be at least 1, got 0"),
        ("av-ade", {"ema_decay": 1.0}, "ema_decay must be at least 0"),
        ("av-ade", {"free_bits": -1.0}, "free_bits must be at least 0"),
        ("av-ade", {"reconstruction_weight": -1.0}, "reconstruction_weight must be at least 0"),
        ("av-ade", {"noisy_share": 1.5}, "noisy_share must be from 0 to 1"),
        ("av-ade", {"noisy_share": 0.05, "batch_size": 16}, "noisy_share must .* at least 1/16"),
        ("v-ade", {"noisy_share": 0.5}, "noisy_share must be 0 without a discriminator"),
        ("gan", {"noisy_share": 0.5}, "noisy_share must be 0 without L_C"),
        ("gan", {"reconstruction_weight": 1.0}, "reconstruction_weight must be 0 without L_C"),
        ("av-ade", {"clip": 0.0}, "clip must be above 0"),
        ("av-ade", {"quality_weight": -1.0}, "quality_weight must be at least 0"),
        ("av-ade", {"gp_weight": math.nan}, "gp_weight must be a finite number"),
        ("av-ade", {"cooldown": 1.5}, "cooldown must be from 0 to 1"),
        ("av-ade", {"beta2": 1.0}, "beta2 must be at least 0 and below 1"),
        ("av-ade", {"learning_rate": -1.0}, "learning_rate must be above 0"),
        ("av-ade", {"inference_share": 0.5}, "must be 0 except for a GAN, got 0.5 for av-ade"),
        ("av-ade", {"optimizer": "sgd"}, "optimizer must be one of"),
        ("av-ade", {"d_kind": "projected"}, "d_kind cannot be changed: .* recipe av-ade"),
        ("av-ade-pd", {"gp_weight": 0.5}, "gp_weight must be 0 .* got 0.5 for av-ade-pd"),
        ("gan", {"flow_scales": 1}, "flow_scales: gan has no loss that trains a flow"),
        ("v-ade", {"d_widths": (8, 8)}, "d_widths: v-ade has no discriminator"),
        ("vae", {"g_learning_rate": 1e-4}, "g_learning_rate: vae has no discriminator"),
        ("real-nvp", {"augment": True}, "augment: real-nvp has no discriminator"),
        ("vae", {"flow_width": 8}, "flow_width: vae has no flow"),
        ("real-nvp", {"sigma": "scalar"}, "sigma: real-nvp has no VAE"),
        ("flow-gan-h", {"beta1": 0.5}, "beta1: flow-gan-h has no weights that the likelihood al"),
        ("gan", {"inference_share": 0.0, "beta1": 0.5}, "beta1: gan has no weights that the lik"),
        ("gan", {"inference_share": 0.0, "free_bits": 1.0}, "free_bits: gan has no L_C"),
        ("flow-gan-a", {"dequantizer_width": 32}, "dequantizer_width: flow-gan-a has no L_C"),
        ("av-ade-pd", {"d_patch": 4}, "d_patch: av-ade-pd has no discriminator of pixels"),
        ("av-ade-pd", {"gp_every": 2}, "gp_every: av-ade-pd has no gradient penalty"),
        ("av-ade", {"d_widths": (8,) * 7}, "at least 128 .* 6 stages that halve .*, got 32"),
        ("av-ade", {"d_plain_stages": 3}, "d_plain_stages must be from 0 to 2"),
        ("av-ade", {"d_patch": 3}, "multiple of 3"),
        ("av-ade", {"widths": (8, 8)}, "latent_channels must have one number"),
        ("av-ade", {"flow_mask": "stripes"}, "flow_mask must be one of"),
        ("av-ade", {"flow_max_log_scale": math.inf}, "must be positive and finite, got inf"),
    ],
)
def test_impossible_and_idle_changes_are_refused(name: str, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(name, 32, 3, **change)


def test_unknown_recipe_or_size() -> None:
    with pytest.raises(ValueError, match=r"recipe must be one of gan, .*, got 'x'"):
        recipe("x", 32, 3)
    with pytest.raises(ValueError, match=r"size must be one of tiny, .*, got 'huge'"):
        recipe("vae", 32, 3, "huge")


def test_an_interrupted_gan_can_only_sample(folder: Path, tmp_path: Path) -> None:
    """Until its inference network is trained; when it resumes, its past time counts."""
    dataset = load_dataset(str(folder), None, 8)

    def operations(out: str, images: int, resume: bool = False, **changes: Any) -> list[str]:
        options = RunOptions(images, device="cpu", precision="float32")
        if out == "late":
            options = dataclasses.replace(options, minutes=1e-6)
        config = dataclasses.replace(narrow("gan"), **changes)
        train(config, dataset, tmp_path / out, options, resume)
        found: list[str] = read_config(latest_checkpoint(tmp_path / out))["operations"]
        return found

    assert operations("cut", 64, inference_share=1e-9) == ["sample"]
    operations("late", 10**6)
    operations("late", 10**6, resume=True)
    assert "score" in operations("whole", 64)
    assert "score" in operations("small", 12)  # its last batch exceeds all of its budget


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_smaller_budget_leaves_a_gan_its_inference_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_frozen: bool
) -> None:
    """Whose training counts from the generator's last step, even if that was beyond the budget."""
    dataset, config, run = load_dataset(str(folder), None, 8), narrow("gan"), tmp_path / "run"

    def options(steps: int) -> RunOptions:
        return RunOptions(16 * steps, device="cpu", precision="float32", checkpoint_minutes=99.0)

    with monkeypatch.context() as patched:
        interrupt_after(9 if is_frozen else 8, patched)
        with pytest.raises(KeyboardInterrupt):
            train(config, dataset, run, options(8 if is_frozen else 20), resume=False)
    train(config, dataset, run, options(6), resume=True)
    state = read_state(latest_checkpoint(run))
    assert state["inferring_since"] == 8
    assert state["step"] == 8 + round(6 * config.inference_share)
    assert "score" in read_config(latest_checkpoint(run))["operations"]


def test_what_is_refused_leaves_a_run_as_it_was(
    folder: Path, tmp_path: Path, small_images: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, run = load_dataset(str(folder), None, 8), tmp_path / "run"
    options = RunOptions(images=16 * 2, device="cpu", precision="float32")
    train(narrow("vae"), dataset, run, options, resume=False, source={"data": "here"})
    before = {name: (run / name).read_text() for name in ("run.json", "data.json")}
    assert json.loads(before["data.json"]) == {"data": "here"}
    for config, data, resume, message in [
        (narrow("vae"), dataset, False, "already holds a run"),
        (narrow("v-ade"), dataset, True, "recipe vae, now v-ade; .*flow_scales 0, now 1"),
        (narrow("vae"), dataclasses.replace(dataset, name="other"), True, "images, now other"),
    ]:
        with pytest.raises(RunError, match=message):
            train(config, data, run, options, resume, {"data": "elsewhere"})
    assert before == {name: (run / name).read_text() for name in before}
    assert not caplog.records
    more = load_dataset(str(make_folder(tmp_path / "images", small_images[:200])), None, 8)
    train(narrow("vae"), more, run, options, resume=True)
    assert "files by hash" in caplog.text and "(part train)" in caplog.text
    caplog.clear()
    splits = {**more.splits, "select": "9 files"}
    train(narrow("vae"), dataclasses.replace(more, splits=splits), run, options, resume=True)
    assert "and resumes with 9 files (part select)" in caplog.text


@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_replaces_no_file_of_another_program(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    words = ["train", "vae", "--data", str(folder), "--image-size", "8", "--out", str(out)]
    assert main(words) == 2
    assert f"{out} holds {name}, but no run that can be resumed" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "mine"


def test_a_start_that_failed_can_be_repeated(tmp_path: Path) -> None:
    """Such as on a full disk, before run.json was written."""
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "data.json", {"data": "photos"})
    check_folder(run, False)
    (run / "metrics.jsonl").touch()
    with pytest.raises(RunError, match="holds metrics.jsonl, but no run"):
        check_folder(run, False)


def test_a_resumed_run_keeps_its_image_size(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, run = Path(shutil.copytree(folder, tmp_path / "photos")), tmp_path / "run"
    dataset = load_dataset(str(photos), None, 8)
    open_run(run, recipe("vae", 8, 3), dataset, RunOptions(images=16), None)
    Image.new("RGB", (16, 16)).save(photos / "0.png")  # the first image now
    words = ["train", "vae", "--data", str(photos), "--out", str(run), "--resume", "--dry-run"]
    assert main(words) == 0
    assert main([*words, "--image-size", "16"]) == 2
    assert "it was started with image_size 8, now 16\n" in capsys.readouterr().err


def test_a_run_that_diverged_says_how_to_start_again(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"

    def diverge(*given: Any) -> None:
        raise TrainingDiverged("step 9: why")

    monkeypatch.setattr("ade_cli.train.train", diverge)
    assert main(["train", "vae", "--data", str(folder), *TRAIN, "--out", str(run)]) == 2
    said = "step 9: why; --resume would repeat the same steps: start again with another --out, and"
    assert said in capsys.readouterr().err


def test_a_run_has_one_process(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with held_by_another(out / LOCK):
        for verb in (["train", "vae", "--data"], ["fit"]):
            assert main([*verb, str(folder), "--image-size", "16", "--out", str(out)]) == 2
            assert "is in use by another process" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [LOCK]


def test_processes_draw_one_batch_of_noise() -> None:
    whole = _Noise(3, 7, torch.device("cpu"), 0, 1)
    shares = [_Noise(3, 7, torch.device("cpu"), rank, 2) for rank in range(2)]
    for draw in ("uniform", "normal"):
        assert torch.equal(
            getattr(whole, draw)(6, 2), torch.cat([getattr(share, draw)(3, 2) for share in shares])
        )


def test_pytorch_gets_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not know the CPU limit of a container."""
    before = torch.get_num_threads()
    try:
        for cores, threads in ((4, 3), (2, 2)):
            torch.set_num_threads(3)
            monkeypatch.setattr("training.device.available_cores", lambda cores=cores: cores)
            choose_device("cpu")
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("traced_before")
def test_an_export_leaves_the_number_of_threads_as_it_was(
    tiny_checkpoint: Path, small_images: np.ndarray, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        export_bundle(tiny_checkpoint, tmp_path / "out", "tiny", small_images[:40], None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_losses() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 1.0])
    d_real, d_fake = real.sigmoid(), fake.sigmoid()
    expected = -(d_real.log().mean() + (1 - d_fake).log().mean())
    assert torch.allclose(discriminator_loss(real, fake), expected)
    assert torch.allclose(
        quality_loss(fake), -(d_fake.log() - (1 - d_fake).log()).mean(), atol=1e-6
    )


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_gradient_penalty(target: float) -> None:
    linear = torch.nn.Linear(12, 1)
    discriminator = torch.nn.Sequential(torch.nn.Flatten(), linear, torch.nn.Flatten(0))
    penalty = gradient_penalty(discriminator, torch.rand(5, 3, 2, 2), target)
    assert penalty.item() == pytest.approx((linear.weight.norm().item() - target) ** 2, rel=1e-4)
    penalty.backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_discriminator_shapes(kind: str) -> None:
    for size, patch, plain in ((32, 1, 0), (48, 2, 1), (64, 2, 2)):
        discriminator = Discriminator(DiscriminatorConfig((4, 4, 4), kind, plain, patch), size, 3)
        assert discriminator(torch.rand(2, 3, size, size)).shape == (2,)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list(recipe_names()))
def test_recipes_are_complete_and_survive_json(name: str, size: str) -> None:
    for image_size in (32, 48, 64):
        config = recipe(name, image_size, 3, size)
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (config.discriminator is not None) == (name not in ("vae", "v-ade", "real-nvp"))
    assert (config.model.flow_scales > 0) == (name not in ("gan", "gan-rd", "vae", "av-gde"))
    assert config.coverage == (name not in ("gan", "gan-rd", "flow-gan-a"))
    assert config.discriminator is None or (
        config.discriminator.kind == "residual"
    ) == name.endswith("rd")


def test_configurations_that_are_not_ours_are_refused() -> None:
    values = recipe("av-ade", 32, 3).to_dict()
    with pytest.raises(ConfigError, match=r"unknown fields: \['max_grad_norm'\]"):
        TrainConfig.from_dict({**values, "max_grad_norm": 1.0})
    with pytest.raises(ConfigError, match=r"unknown fields: \['d_residual'\]"):
        TrainConfig.from_dict(
            {**values, "discriminator": {**values["discriminator"], "residual": True}}
        )


def test_the_settings_of_the_refinements() -> None:
    base, wide, iaf, two = (
        recipe(n, 32, 3).model for n in ("av-ade", "av-ade-wg-rd", "av-ade-iaf-rd", "av-ade-s2")
    )
    assert wide.widths == tuple(2 * w for w in base.widths)
    assert iaf == dataclasses.replace(base, posterior_iaf=True) and two == dataclasses.replace(
        base, flow_scales=2
    )
    assert recipe("gan", 32, 3).model.latent_channels[1:] == (0, 0)
    assert recipe("gan", 32, 3, inference_share=0.0).model.operations == ("sample",)


def test_systems_of_the_papers_size_have_equally_many_weights() -> None:
    """The generator is narrower in systems with f, so that weights agree within one per cent.

    Those of `gan` and `av-ade-s2` do not, as the pages say.
    f is that of the paper's footnote 3: one scale, three residual blocks of two layers in each
    coupling.
    """
    for size in (32, 64):
        with_flow, without = (count_weights(recipe(n, size, 3, "paper")) for n in ("v-ade", "vae"))
        assert with_flow.model == pytest.approx(without.model, rel=0.01)
    base = count_weights(recipe("av-ade", 32, 3, "paper")).model
    for name, more in (("gan", 0.25), ("av-ade-s2", 0.19)):
        assert count_weights(recipe(name, 32, 3, "paper")).model / base - 1 == pytest.approx(
            more, abs=0.01
        )
    flow = ADEModel(recipe("v-ade", 32, 3, "paper").model).flow
    couplings = [module for module in flow.modules() if isinstance(module, CheckerboardCoupling)]
    for coupling in couplings:
        blocks = [module for module in coupling.modules() if isinstance(module, ResidualBlock)]
        assert [
            sum(isinstance(m, torch.nn.Conv2d) for m in block.modules()) for block in blocks
        ] == [2, 2, 2]
    assert couplings


def test_every_field_that_can_be_changed_is_described_and_has_an_effect(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A dry run prints the changed configuration and writes nothing."""
    described = {
        prefix + name
        for config, prefix in ((TrainConfig, ""), (ModelConfig, ""), (DiscriminatorConfig, "d_"))
        for name in re.findall(r"^ {4}(\w+): ", str(inspect.getdoc(config)), re.MULTILINE)
    }
    assert described >= {*fields(), *FIXED}
    networks = {
        "flow_scales": 2,
        "flow_mask": "checkerboard",
        "flow_couplings": 3,
        "flow_blocks": 2,
        "flow_width": 24,
        "flow_max_log_scale": 0.5,
        "dequantizer_width": 12,
        "widths": [48, 32],
        "latent_channels": [4, 6],
        "decoder_blocks": [0, 2],
        "patch": 1,
        "sigma": "scalar",
        "posterior_iaf": True,
    }
    opponent = {"widths": [16, 24, 24], "plain_stages": 1, "patch": 1}
    given = {**networks, **{f"d_{name}": value for name, value in opponent.items()}, "flips": False}
    listed = "".maketrans("", "", '[]" ')
    words = [f"{name}={json.dumps(value).translate(listed)}" for name, value in given.items()]
    out = tmp_path / "out"
    arguments = ["train", "av-ade", "--data", str(folder), "--image-size", "8", "--out", str(out)]
    assert main([*arguments, "--dry-run", "--set", *words]) == 0
    assert not out.exists()
    config = json.loads(capsys.readouterr().out)
    assert config["model"] == {**config["model"], **networks} and config["flips"] is False
    assert config["discriminator"] == {**opponent, "kind": "plain"}


def test_a_dry_run_writes_nothing(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for verb, entry in VERBS.items():  # another one would need a test
        parser = argparse.ArgumentParser()
        importlib.import_module(entry.module).add_arguments(parser)
        assert ("--dry-run" in parser.format_help()) == (verb == "train")
    monkeypatch.chdir(tmp_path)

    def tree() -> dict[str, tuple[int, int]]:
        found = {path: path.lstat() for root in (folder, tmp_path) for path in root.rglob("*")}
        return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}

    dataset = load_dataset(str(folder), None, 8)
    open_run(tmp_path / "run", recipe("vae", 8, 3), dataset, RunOptions(images=16), None)
    (tmp_path / "new" / "cache").mkdir(parents=True)  # as an interrupted start leaves it
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("training.datasets.folder.decode_into", None)  # as images are decoded
    before = tree()
    for words, refused in (
        ("", ""),
        ("--out new", ""),
        ("--out run --resume", ""),
        ("--out run", "run holds a run: continue it with --resume"),
        ("--out run --resume --set learning_rate=0.1", "learning_rate 0.0005, now 0.1\n"),
    ):
        given = ["train", "vae", "--data", str(folder), "--image-size", "8", "--out", "out"]
        assert main([*given, *words.split(), "--dry-run"]) == (2 if refused else 0)
        printed = capsys.readouterr()
        assert refused in printed.err and bool(printed.out) != bool(refused) and tree() == before


def test_an_option_may_need_another_one() -> None:
    """Without which it changes nothing and is refused, as below."""
    assert recipe("vae", 32, 3, flow_scales=1, flow_width=8).model.flow_width == 8
    assert recipe("flow-gan-h", 32, 3, dequantizer_width=4, beta1=0.5).beta1 == 0.5
    assert recipe("gan", 32, 3, free_bits=1.0, beta1=0.9).free_bits == 1
    assert len(trainer(narrow("flow-gan-h", dequantizer_width=4)).optimizer.param_groups) == 2


def test_a_grid_of_scales_and_blocks_can_be_trained(small_images: np.ndarray) -> None:
    for scales, blocks in ((1, 2), (2, 1), (3, 3)):
        config = recipe(
            "v-ade",
            8,
            3,
            "paper",
            flow_scales=scales,
            flow_blocks=blocks,
            flow_width=4,
            widths=(8, 8, 8, 8),
            batch_size=4,
        )
        assert np.isfinite(trainer(config).run(batches(small_images, 1, config)[0])["bpd"])


def test_batches_do_not_depend_on_where_they_start(small_images: np.ndarray) -> None:
    images = ImageSet(small_images)
    whole = images.batches(32, seed=1)
    first = [next(whole) for _ in range(25)]
    late = images.batches(32, seed=1, first_image=20 * 32)
    assert np.array_equal(first[20], next(late)) and np.array_equal(first[21], next(late))
    epoch = np.concatenate(first)[:300]
    order = [
        [i.tobytes() for i in np.concatenate(first)[start : start + 300]] for start in (0, 300)
    ]
    shared = set(order[0][:64]) & set(order[1][:64])
    assert len(shared) < 30  # two epochs are two orders: 14 of 64 meet by chance
    assert sorted(i.tobytes() for i in epoch) == sorted(i.tobytes() for i in small_images)


TRAIN = shlex.split(
    "--size tiny --image-size 8 --precision float32 --checkpoint-steps 20 --evaluate-steps 50 "
    "--set batch_size=16"
)
NARROW = shlex.split(
    "--set widths=8,8,8 latent_channels=3,2,2 decoder_blocks=1,1,1 flow_couplings=2 flow_width=8"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_images: np.ndarray) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "images", small_images)


def losses_of(run: Path) -> dict[int, tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        row["step"]: tuple(row.get(name) for name in ("bpd", "d_loss", "quality_loss"))
        for row in rows
        if "bpd" in row
    }


@pytest.mark.slow
def test_two_processes_train_as_one(folder: Path, tmp_path: Path) -> None:
    """Two nodes are compared with one process below."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["train", "av-ade", "--data", str(folder), *TRAIN, "--images", str(16 * 100)]
    # At low rates: a strong discriminator makes much of the last digits within thirty steps.
    arguments += ["--set", "g_learning_rate=1e-4", "d_learning_rate=1e-4", "--device", "cpu"]
    assert main([*arguments, "--out", str(one)]) == 0
    launcher = ["--standalone", "--nproc-per-node", "2"]
    text = tmp_path / "text"
    assert torchrun(launcher, [*arguments, "--out", str(two)], text).wait() == 0, text.read_text()
    a, b = losses_of(one), losses_of(two)
    assert a.keys() == b.keys()
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=1e-4)
    rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert all("gradient_penalty" in row for row in rows if "d_loss" in row)  # of every fourth step


@pytest.mark.parametrize("name, value", [("device", "gpu"), ("precision", "bf16")])
def test_misspelt_options_are_errors(name: str, value: str) -> None:
    with pytest.raises(RunError, match=f"{name} must be one of auto, .*, got '{value}'"):
        RunOptions(images=1, **{name: value})


def test_a_report_shows_density_samples_only_of_a_sigma_that_was_trained(
    folder: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(str(folder), None, 8)
    options = RunOptions(images=16, device="cpu", precision="float32", evaluate_steps=1)
    for name, has_density in (("v-ade", True), ("gan", False), ("real-nvp", False)):
        config = narrow(name, **({"inference_share": 0.0} if name == "gan" else {}))
        train(config, dataset, tmp_path / name, options, resume=False)
        report = (tmp_path / name / "report.md").read_text()
        assert "![mean samples](pictures/samples-mean.png)" in report
        assert ("density" in report) == has_density
        if has_density:
            assert re.search(r"\n- KL, bits per dimension, on the part `select`: \S+", report)
            assert "broken.png" in report and [*(tmp_path / name / "tensorboard").iterdir()]
        assert (tmp_path / name / "pictures" / "samples-density.png").is_file() == has_density


@pytest.mark.parametrize("name", ["model", "raw", "optimizer", "discriminator", "d_optimizer"])
def test_a_damaged_or_incomplete_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path, trainer(), Progress(), {"recipe": "av-ade"})
    path = folder / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ConfigError, match=f"{path} is not a safetensors file: "):
        load_checkpoint(folder, trainer())
    if name == "model":
        with pytest.raises(ConfigError, match="is not a safetensors file"):
            load_model(folder)
    path.unlink()
    with pytest.raises(ConfigError, match=f"{path} cannot be read: No such file or directory$"):
        load_checkpoint(folder, trainer())


def test_damaged_json_is_named(tmp_path: Path) -> None:
    nothing = argparse.Namespace(data=None, root=None)
    for name, error, read in (
        ("run.json", RunError, last_options),
        ("run.json", RunError, read_started),
        ("state.json", RunError, read_state),
        ("evaluation.json", RunError, lambda run: _store({}, run / "evaluation.json", "test")),
        ("evaluation.json", ExportError, evaluation_of),
        ("data.json", DataError, lambda run: dataset_of(nothing, run)),
    ):
        for content in ('{"data', "[1]", ""):
            (tmp_path / name).write_text(content)
            with pytest.raises(error, match=f"{tmp_path / name} is damaged: "):
                read(tmp_path)
    (tmp_path / "state.json").write_text('{"step": 1, "images": 2, "seconds": 3.0}')
    with pytest.raises(
        RunError, match="it lacks .* usual_norm, joint_since, inferring_since, rescued_at"
    ):
        read_state(tmp_path)


def test_a_lost_process_is_an_error_of_the_run() -> None:
    """Of a single process there is nothing to lose: its errors are its own."""
    with (
        pytest.raises(RunError, match="process 1 of 2 has lost the others: .*resume.*Connection"),
        _with_others(SimpleNamespace(world_size=2, global_rank=1)),
    ):
        raise RuntimeError("Connection closed by peer\nand a stack")
    with (
        pytest.raises(RuntimeError, match="of its own"),
        _with_others(SimpleNamespace(world_size=1, global_rank=0)),
    ):
        raise RuntimeError("of its own")


def test_nodes_with_other_images_or_weights_are_refused(small_images: np.ndarray) -> None:
    """Their gradients would be averaged all the same, and their models never become alike."""
    dataset = Dataset("d", {"train": ImageSet(small_images)}, {"train": "all"})

    def check(theirs: Trainer, its: Dataset, sketch: str = "same files") -> None:
        sent: list[torch.Tensor] = []

        def gather(value: torch.Tensor) -> torch.Tensor:
            sent.append(value)
            return torch.stack(sent)

        fabric: Any = SimpleNamespace(world_size=2, global_rank=0, all_gather=gather)
        _check_alike(fabric, dataset, ["same files"], trainer())
        _check_alike(fabric, its, [sketch], theirs)

    check(trainer(), dataset)
    check(
        trainer(), dataclasses.replace(dataset, name="a link", splits={"train": "all", "test": "1"})
    )
    fewer = {"train": dataset.parts["train"].slice(0, 9)}
    with pytest.raises(RunError, match="process 1 of 2 has other training images than process 0"):
        check(trainer(), dataclasses.replace(dataset, parts=fewer))
    with pytest.raises(RunError, match="process 1 of 2 has other training images than process 0"):
        check(trainer(), dataset, "others of the same names")
    with pytest.raises(RunError, match="has other initial weights than process 0"):
        check(trainer(seed=1), dataset)
    theirs = trainer()
    assert theirs.discriminator is not None
    theirs.discriminator.load_state_dict(trainer(seed=1).discriminator.state_dict())
    with pytest.raises(RunError, match="has other initial weights than process 0"):
        check(theirs, dataset)  # each would keep its own, and only one is saved
    theirs = trainer()
    assert theirs.discriminator is not None
    theirs.discriminator.register_buffer("rounded", torch.ones(1))
    check(theirs, dataset)  # as spectral norms are, by each processor in its way


def torchrun(launcher: list[str], arguments: list[str], out: Path) -> subprocess.Popen[bytes]:
    """``ade`` in processes that ``torchrun`` starts; its output goes to ``out``."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "ade_cli.main"]
    with open(out, "wb") as output:
        return subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that all its processes can be killed at once
        )


@pytest.mark.slow
def test_a_node_dies_and_the_run_resumes_on_the_other(folder: Path, tmp_path: Path) -> None:
    """Two nodes train as one process; what is left after a death is resumed by one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["train", "av-ade", "--data", str(folder), *TRAIN]
    arguments += ["--images", str(16 * 60), "--device", "cpu", "--checkpoint-steps", "10"]
    assert main([*arguments, "--out", str(one)]) == 0

    (port,) = free_ports(1)
    launcher = shlex.split(
        f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} "
        "--rdzv-id test --rdzv-conf"
    )
    texts = [tmp_path / f"node-{rank}.txt" for rank in range(2)]
    nodes = [
        torchrun([*launcher, f"is_host={int(not rank)}"], [*arguments, "--out", str(two)], text)
        for rank, text in enumerate(texts)
    ]
    try:
        deadline = time.monotonic() + 300
        while not (two / "checkpoints" / "step-000000010").is_dir():
            assert all(node.poll() is None for node in nodes), texts[0].read_text()
            assert time.monotonic() < deadline, "the nodes did not begin"
            time.sleep(0.02)
        # The one that does not write the checkpoints; torchrun's processes have no order.
        (dying,) = [
            node
            for node in nodes
            if "0" not in {rank_of(p) for p in psutil.Process(node.pid).children(recursive=True)}
        ]
        own = psutil.Process(dying.pid)
        for process in [*own.children(recursive=True), own]:
            process.kill()
        (other,) = [node for node in nodes if node is not dying]
        assert other.wait(120) != 0
    finally:
        for node in nodes:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
    text = texts[nodes.index(other)].read_text()
    assert "ade train: process 0 of 2 has lost the others: one ended" in text, text

    assert main([*arguments, "--out", str(two), "--resume"]) == 0
    a, b = losses_of(one), losses_of(two)
    assert a.keys() == b.keys() and 60 in a
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=2e-4)


def rank_of(process: psutil.Process) -> str | None:
    with suppress(psutil.Error):
        return process.environ().get("RANK")
    return None


@pytest.mark.slow
def test_images_to_bundle_and_back(
    tmp_path: Path,
    small_images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The first commands of the training guide, in seconds and on tiny images, and what follows.

    The bundle is evaluated, and its gate is measured.
    """
    more = np.concatenate([small_images, small_images[:, :, ::-1], 255 - small_images[:100]])
    make_folder(tmp_path / "DIR", more)
    monkeypatch.chdir(tmp_path)
    *commands, serve = ade_commands(ROOT / "docs" / "training.md")[:5]
    printed: dict[str, str] = {}
    for verb, *words in commands:
        words = [{"16": "0.05", "64": "8"}.get(word, word) for word in words]
        assert main([verb, *words, *(NARROW if verb == "train" else ())]) == 0, words
        printed[verb] = capfd.readouterr().out
    assert [*printed, serve[0]] == ["train", "evaluate", "export", "calibrate", "serve"]
    assert verify_bundle(Path(serve[1])).manifest["calibration"]["images"] > 50
    bundle = Path(commands[-1][1])
    result = json.loads(printed["evaluate"])
    assert result.keys() == {"select"} and result["select"]["figures"]["bpd"]["value"] < 20
    assert json.loads((bundle / "manifest.json").read_text())["evaluation"] == result
    named = tmp_path / os.fsdecode(b"caf\xe9")  # folders' names need not be UTF-8
    make_folder(named, small_images)  # those that it was trained on, and too few others
    words = ["calibrate", str(bundle), str(tmp_path / "calibrated"), "--data", str(named)]
    assert main(words) == 2
    assert "the model was trained on files of caf" in capfd.readouterr().err
    shutil.rmtree(named)
    make_folder(named, small_images[:, ::-1])
    (named / "wide.png").unlink()  # the folder of the training has the same file
    assert main(words) == 0
    said = capfd.readouterr().err
    assert re.search(r"with 1[67]\d calibration images", said), said
    assert "left out" in said and "  alpha 0.05: " in said
    at_home = sorted(path.name for path in bundle.iterdir())
    assert main(["evaluate", str(bundle), "--data", str(named)]) == 0
    # The given-away bundle has no cache of decoded images.
    assert sorted(path.name for path in bundle.iterdir()) == at_home


def test_a_resumed_run_keeps_its_budget_device_and_cadence(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[tuple[Any, ...]] = []

    def note(config: Any, dataset: Any, run: Path, options: RunOptions, *rest: Any) -> Progress:
        cadence = (options.device, options.checkpoint_steps, options.evaluate_steps)
        seen.append((options.images, options.minutes, *cadence))
        open_run(run, config, dataset, options, None)
        return Progress()

    monkeypatch.setattr("ade_cli.train.train", note)
    arguments = ["train", "vae", "--data", str(folder), "--image-size", "8", "--out"]
    cases: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("a", (1_000_000, None, "auto", 1000, 500)),
        ("b --images 64 --minutes 2 --device cpu", (64, 2, "cpu", 1000, 500)),
        ("b --resume", (64, 2, "cpu", 1000, 500)),
        ("b --resume --images 128 --device auto", (128, None, "auto", 1000, 500)),
        ("c --minutes 5 --checkpoint-steps 7", (NO_LIMIT, 5, "auto", 7, 500)),
        ("c --resume --evaluate-steps 3", (NO_LIMIT, 5, "auto", 7, 3)),
        ("c --resume", (NO_LIMIT, 5, "auto", 7, 3)),
    )
    monkeypatch.chdir(tmp_path)
    for words, expected in cases:
        assert main([*arguments, *words.split()]) == 0 and seen[-1] == expected
    assert main([*arguments, "c", "--resume", "--minutes", "9"]) == 2
    assert f"minutes became {NO_LIMIT:,} images when c was started" in capsys.readouterr().err


@pytest.fixture(scope="module")
def made_before(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of those images, ``old``, and a checkpoint without its data, ``model``."""
    made = tmp_path_factory.mktemp("before")
    trained_on(folder, made / "old")
    (made / "model").mkdir()
    save_model(ADEModel(narrow("vae").model), made / "model", {"recipe": "vae"})
    return made


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if an image of a folder is decoded."""
    monkeypatch.setattr("training.datasets.folder.decode_into", None)


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize(
    "words, message",
    [
        (
            "train av-ade --size tiny --image-size 8 --out IN/old --resume",
            "it was started with recipe vae, now av-ade; batch_size 16, now 32",
        ),
        ("train vae --image-size 8 --out IN/new --device cuda", "PyTorch finds no CUDA device"),
        ("export IN/model IN/old", "exists: export to a new folder"),
        ("export IN/model IN/new --name a;b", "a model's name must start with a letter"),
        ("encoder IN/out.onnx --image-size 4", "needs images of 8 pixels or more, got 4"),
    ],
)
def test_images_are_not_decoded_for_what_cannot_begin(
    words: str,
    message: str,
    folder: Path,
    made_before: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made_before, "IN")
    assert main([*words.split(), "--data", str(folder)]) == 2
    assert message in capsys.readouterr().err and not Path("IN", "new").exists()


@pytest.mark.parametrize(
    "here, nodes, total, message",
    [
        ("3", "1", "3", "batch_size must be a multiple of 3, the number of processes, got 16"),
        ("2", "2", "6", "every node needs the same number of processes, got 2 on this one and 6"),
        ("4", "2", "6", "every node needs the same number of processes, got 4 on this one and 6"),
        (None, None, "2", "several processes must be started by torchrun, which sets LOCAL_WORLD"),
        (None, None, "1", ""),  # some schedulers set it for a single process, too
    ],
)
def test_processes_that_cannot_train_together_are_refused(
    here: str | None, nodes: str | None, total: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "WORLD_SIZE")
    for name, value in zip(names, (here, nodes, total), strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=message) if message else nullcontext():
        check_start(narrow("vae"), Path("new"), RunOptions(images=1), resume=False)


def trained_on(folder: Path, run: Path) -> Path:
    """A short run that names its data set, as ``ade train`` makes them."""
    options = RunOptions(images=16, device="cpu", precision="float32")
    source = {"data": str(folder), "root": None}
    dataset = load_dataset(str(folder), None, 8)
    train(narrow("vae"), dataset, run, options, resume=False, source=source)
    return run


@pytest.mark.parametrize(
    "words, remedy",
    [
        ("fit x", "--device cpu and another --out"),
        ("evaluate x", "--device cpu"),
        ("encoder x --data x", "--device cpu"),
        (
            "train vae --data x --out x",
            "a smaller batch (--set batch_size=N) and another --out, or --device cpu",
        ),
    ],
)
def test_every_verb_names_its_remedy_for_too_little_memory_of_a_gpu(
    words: str, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    verb = words.split()[0]
    monkeypatch.setattr(f"ade_cli.{verb}.run", out_of_memory)
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert said == f"ade {verb}: the GPU has too little memory: give {remedy}\n"


def test_a_run_does_not_resume_on_another_folder_of_the_same_name(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine = shutil.copytree(folder, tmp_path / "a" / "photos")
    other = shutil.copytree(folder, tmp_path / "b" / "photos")
    run = trained_on(mine, tmp_path / "run")
    recorded = (run / "data.json").read_text()
    resumed: list[str] = []
    monkeypatch.setattr("ade_cli.train.dataset_of", lambda *_, **__: resumed.append("x") or dataset)
    monkeypatch.setattr("ade_cli.train.train", lambda *_: Progress())
    dataset = load_dataset(str(other), None, 8)
    given = ["train", "vae", *TRAIN, "--resume", "--out", str(run), "--data"]
    for data in (str(other), str(folder), "cifar10"):
        assert main([*given, data]) == 2
        said = capsys.readouterr().err
        assert f"{run} was trained on {mine}, not on {data}: give the same --data, or" in said
    assert not resumed and (run / "data.json").read_text() == recorded
    (tmp_path / "link").symlink_to(mine)
    for data in (mine, tmp_path / "link"):
        assert main([*given, str(data)]) == 0 and "warning" not in capsys.readouterr().err
    # A folder that was moved.
    mine.rename(tmp_path / "moved")
    assert main([*given, str(tmp_path / "moved")]) == 2
    capsys.readouterr()
    assert main([*given, str(other)]) == 0 and len(resumed) == 3
    assert f"warning: {mine}, on which {run} was trained, no longer" in capsys.readouterr().err


def test_an_image_size_that_the_user_did_not_give_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (250, 150)).save(photos / "a.png")
    given = ["--data", str(photos), "--out", str(tmp_path / "out")]
    for words in (["train", "av-ade", "--dry-run"], ["train", "av-ade"]):
        assert main([*words, *given]) == 2
        said = capsys.readouterr().err
        assert "--image-size must be a multiple of 8 (3 latent resolutions, 1 flow scale)" in said
        assert f"got 150, the size of the first image in {photos}: give --image-size 64" in said
        assert main([*words, *given, "--image-size", "50"]) == 2
        assert capsys.readouterr().err.endswith("got 50\n")
    Image.new("RGB", (28, 30)).save(photos / "a.png")
    assert main(["train", "av-ade", "--dry-run", *given]) == 2
    assert capsys.readouterr().err.endswith("give --image-size 32\n")
    Image.new("RGB", (250, 150)).save(photos / "a.png")
    # Of another fault the size says nothing.
    assert main(["train", "av-ade", *given, "--set", "widths=8"]) == 2
    assert "first image" not in capsys.readouterr().err
    # Nobody trains at the size of a photograph on purpose.
    Image.new("RGB", (500, 336)).save(photos / "a.png")
    for words in (["train", "av-ade", "--dry-run"], ["train", "av-ade"]):
        assert main([*words, *given]) == 2
        assert "has 336 pixels per side, and all would be read" in capsys.readouterr().err


def test_a_checkpoint_is_measured_like_its_run_and_keeps_the_better_figures(
    made_before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(made_before / "old", tmp_path / "run"))
    checkpoint = latest_checkpoint(run)
    for place, count, kept in ((checkpoint, 6, 6), (run, 4, 6), (checkpoint, 7, 7)):
        given = ["--final", "--images", str(count), "--device", "cpu"]
        assert main(["evaluate", str(place), *given]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["test"]["images"] == count
        assert json.loads((checkpoint / "evaluation.json").read_text())["test"]["images"] == kept
        assert ("evaluation.json is kept" in printed.err) == (count < kept)
    assert (run / "cache").is_dir() and not (checkpoint / "cache").exists()


def test_figures_of_a_checkpoint_that_was_replaced_are_printed(
    made_before: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a training does that still runs."""
    run = Path(shutil.copytree(made_before / "old", tmp_path / "run"))
    checkpoint = latest_checkpoint(run)

    def replace(*given: Any) -> Dataset:
        shutil.rmtree(checkpoint)
        return dataset_of_run(*given)

    monkeypatch.setattr("ade_cli.evaluate.dataset_of_run", replace)
    given = ["evaluate", str(run), "--images", "4", "--final", "--device", "cpu"]
    assert main(given) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["test"]["images"] == 4 and not checkpoint.exists()
    assert f"{checkpoint} was replaced by a newer checkpoint meanwhile" in printed.err


def test_copies_of_training_images_are_counted(
    small_images: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "images", small_images[:40])
    files = sorted(folder.rglob("*.png"))
    trained = next(file for file in files if part_of(file.name) == "train")
    for file in [file for file in files if part_of(file.name) == "test"][:2]:
        shutil.copy(trained, file)
    run = trained_on(folder, tmp_path / "run")
    assert main(["evaluate", str(run), "--final", "--device", "cpu"]) == 0
    assert "\n2 of " in (said := capsys.readouterr().err)
    assert " images are copies of training images" in said


def test_figures_are_stored_by_part_and_are_not_lost(
    folder: Path,
    made_before: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(made_before / "old", tmp_path / "run"))
    path = latest_checkpoint(run) / "evaluation.json"
    given = ["evaluate", str(run), "--device", "cpu"]
    old = {"data": "x", "part": "test", "images": 1000}  # as version 0.2 wrote it
    path.write_text(json.dumps(old))
    assert evaluation_of(path.parent) is None
    assert main([*given, "--final", "--data", str(folder)]) == 0
    stored = json.loads(path.read_text())
    assert stored.keys() == {"test"} and "excess Fréchet distance" in capsys.readouterr().err
    assert main([*given, "--final", "--seed", "1"]) == 0
    assert "its figures of test are of seed 0, not 1" in capsys.readouterr().err
    other = shutil.copytree(folder, tmp_path / "other")
    assert main([*given, "--final", "--data", str(other)]) == 0
    assert "it is for the run's own data set" in capsys.readouterr().err
    assert json.loads(path.read_text()) == stored
    assert main(given) == 0
    both = json.loads(path.read_text())
    assert both.keys() == {"select", "test"} and both["test"] == stored["test"]
    # `ade export` takes what `ade evaluate` stores.
    exported: list[Any] = []
    monkeypatch.setattr(
        "ade_cli.export.export_bundle",
        lambda folder, out, name, images, evaluation, **_: exported.append(evaluation),
    )
    assert main(["export", str(run), str(tmp_path / "bundle")]) == 0
    assert exported == [both]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "train av-ade --data DATA --out OUT --image-size 50",
            "--image-size must be a multiple of 8 (3 latent resolutions, 1 flow scale), such as 32",
        ),
        ("train av-ade --data nowhere --out OUT", "got 'nowhere', which is neither"),
        ("train av-ade --data DATA --out OUT --images 0", "ade train: --images must be at least 1"),
        ("train av-ade --data DATA --out OUT --seed -1", "seed must be from 0"),
        ("train av-ade --data DATA --out OUT --minutes 0", "ade train: --minutes must be above 0"),
        ("train av-ade --data DATA --out OUT --image-size -4", "at least 2 pixels, got -4"),
        ("train av-ade --data DATA --out OUT --image-size 8 --resume", "holds no run"),
        ("train av-ade --data DATA --out OUT --set batch_size=0", "train: batch_size must be at"),
        ("train av-ade --data DATA --out OUT --set d_widths=0", "train: d_widths must be one or"),
        (
            "train vae --data DATA --out OUT --set widths=8,x",
            "integers separated by commas, got '8",
        ),
        ("train vae --data DATA --out OUT --set flips", "--set: flips must be true or false, got"),
        (
            "train vae --data DATA --out OUT --set flip=0",
            "--set: 'flip' is none of augment, batch_",
        ),
        (
            "train vae --data DATA --out OUT --set coverage=0",
            "--set: 'coverage' is none of augment",
        ),
        ("train best --data DATA --out OUT", "invalid choice: 'best'"),
        ("train vae --data DATA --out DATA/run", "--out must lie outside of"),
        ("evaluate OUT", "there is no run, checkpoint or bundle"),
        ("export OUT OUT2", "there is no run, checkpoint or bundle"),
        ("export DATA OUT2", "holds no finished checkpoint"),
        ("calibrate OUT OUT2 --data DATA", "is not a bundle"),
        ("serve OUT", "is not a bundle"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    words: str,
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, because each new one would load PyTorch."""
    places = {"DATA": folder, "DATA/run": folder / "run"}
    places |= {"OUT": tmp_path / "out", "OUT2": tmp_path / "out2"}
    try:
        status: object = main([str(places.get(word, word)) for word in words.split()])
    except SystemExit as ended:  # of the parser
        status = ended.code
    printed = capsys.readouterr()
    assert status == 2 and message in printed.err and not printed.out


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_a_bundle_names_its_data_but_not_their_place(
    verb: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [str(tmp_path / "out")] if verb == "export" else []
    assert main([verb, str(tiny_bundle), *out]) == 2
    assert f"{tiny_bundle} does not record where its images are" in capsys.readouterr().err
