"""Small runs: schedule, checkpoints, exact resumption and kill -9."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from ade_base.errors import ConfigError
from ade_cli.data_options import dataset_of
from ade_cli.evaluate import _store
from ade_cli.main import main
from ade_model.checkpoint import load_model, read_config
from export.write import ExportError, evaluation_of, export_bundle
from tests.helpers import interrupt_after, make_folder, narrow
from tests.training_runs import NARROW, losses_of, trainer
from training.data import DataError, ImageSet
from training.datasets import load_dataset
from training.device import choose_device
from training.loop import train
from training.run_options import RunOptions
from training.run_start import check_folder, last_options, read_started
from training.runs import (
    WARM_NAME,
    Progress,
    RunError,
    checkpoint_folders,
    folder_name,
    latest_checkpoint,
    load_checkpoint,
    load_warm_start,
    read_state,
    save_checkpoint,
    write_json,
)
from training.step import LAST_RATE, Trainer


def test_rates_fall_in_the_last_part_of_a_budget(folder, tmp_path, monkeypatch):
    """For budgets of images and of minutes; a larger budget restores them until its last part."""
    shares: list[float] = []
    run = Trainer.run

    def look(self, drawn, spent=0.0):
        losses = run(self, drawn, spent)
        shares.append(round(self.optimizer.param_groups[0]["lr"] / self.config.learning_rate, 3))
        return losses

    def shares_of(name, out, images, **more):
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


def test_the_likelihood_alone_then_both_then_lower_rates(folder, tmp_path, monkeypatch):
    """In one run, whose budget in images decides each step; minutes become images at its start."""
    seen: list[tuple[int, bool, float, float]] = []
    run = Trainer.run

    def look(self, drawn, spent=0.0):
        losses = run(self, drawn, spent)
        rate, share = self.optimizer.param_groups[1]["lr"], self._quality_share
        seen.append((len(drawn[-1]), "d_loss" in losses, round(rate, 6), share))
        return losses

    monkeypatch.setattr(Trainer, "run", look)
    dataset = load_dataset(str(folder), None, 8)
    config = dataclasses.replace(narrow("av-ade"), warmup_steps=2, cooldown=0.25, **PHASES)
    options = RunOptions(images=16 * 8, device="cpu", precision="float32")
    progress = train(config, dataset, tmp_path / "run", options, resume=False)
    g = config.g_learning_rate
    assert seen[:8] == [(8, False, rate, 1) for rate in (1e-3, *[2e-3] * 7)]
    assert [line[:2] for line in seen[8:]] == [(16, True)] * 4
    assert [line[2] for line in seen[8:]] == pytest.approx([g, g, g * 0.673, g * 0.347], abs=1e-6)
    assert [line[3] for line in seen[8:]] == [1, 1, 1, 1]
    assert (progress.step, progress.images) == (12, 128)
    # The end of the first phase is kept, to fall back on.
    kept = [path.name for path in checkpoint_folders(tmp_path / "run")]
    assert kept == [folder_name(8), folder_name(12)]
    timed = dataclasses.replace(options, images=10**9, minutes=0.01)
    train(config, dataset, tmp_path / "timed", timed, resume=False)
    resolved = read_started(tmp_path / "timed")["options"]
    assert resolved["minutes"] == 0.01 and 16 <= resolved["images"] < 10**6
    state = read_state(latest_checkpoint(tmp_path / "timed"))
    assert state["joint_since"] == round(resolved["images"] / 2 / 8)


def test_a_flagship_that_is_killed_and_resumed_ends_with_the_same_bytes(folder, tmp_path, capsys):
    """In each phase: all that a step depends on is in the checkpoint.

    The recipe's own settings, with narrow networks: 10 steps of likelihood alone, then 10 joint
    ones, of which the generator learns from the last 7. Until the adversaries take part, the run
    can also resume with others.
    """
    arguments = ["train", "flagship", "--data", str(folder), "--image-size", "8", "--size", "tiny"]
    arguments += [*NARROW, "widths=16,16,16", "flow_width=16", "alone_steps=3", "warmup_steps=3"]
    whole, cut, resume = tmp_path / "whole", tmp_path / "cut", list[str]()
    once = ["--images", "320", "--checkpoint-steps", "1", "--precision", "bfloat16"]  # are kept
    assert main([*arguments, *once, "--out", str(whole)]) == 0
    command = [sys.executable, "-m", "ade_cli.main", *arguments, "--out", str(cut)]
    for step in (3, 10, 15):
        with open(os.devnull, "w") as null:
            process = subprocess.Popen([*command, *(resume or once)], stdout=null, stderr=null)
        while process.poll() is None and not any(
            path.name >= folder_name(step) for path in checkpoint_folders(cut)
        ):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        resume = ["--resume"]
    for words, message in (
        ([], "with --resume"),
        (["--resume", "--set", "quality_weight=3"], "started with quality_weight 0.05, now 3.0"),
        (["--resume", "--set", "alone_steps=4"], "started with alone_steps 3, now 4"),
        (["--resume", "--seed", "3"], "--seed must be that of the run, 0, with"),
    ):
        assert main([*arguments, "--out", str(cut), *words]) == 2
        assert message in capsys.readouterr().err
    assert main([*arguments, "--out", str(cut), "--resume"]) == 0
    assert losses_of(cut) == losses_of(whole) and list(losses_of(whole)) == [1, 10, 20]
    # 160 images of likelihood alone in batches of 16, then as many in joint steps.
    assert read_state(latest_checkpoint(whole))["joint_since"] == 10
    paths = sorted(latest_checkpoint(whole).glob("*.safetensors"))
    assert len(paths) == 7 and latest_checkpoint(whole).name == "step-000000020"
    for path in paths:
        assert path.read_bytes() == (latest_checkpoint(cut) / path.name).read_bytes(), path.name


def test_a_lost_checkpoint_is_replaced_by_the_warm_start(folder, tmp_path, caplog):
    """In each phase; the curve continues where it was."""
    config = dataclasses.replace(narrow("flagship"), alone_steps=2, warmup_steps=2)
    dataset, run = load_dataset(str(folder), None, 8), tmp_path / "run"
    options = RunOptions(images=16 * 6, device="cpu", precision="float32", evaluate_steps=2)
    train(config, dataset, run, options, resume=False)
    for images, step in ((16 * 8, 6), (16 * 14, 8)):
        shutil.rmtree(run / "checkpoints")
        caplog.clear()
        train(config, dataset, run, dataclasses.replace(options, images=images), resume=True)
        assert f"resumes from {WARM_NAME}, of step {step}, with new optimisers" in caplog.text
    rows = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, 15, 2))
    levels = len(config.model.latent_shapes)
    logits = {f"{one}logit_{part}" for one in ("", "pixel_") for part in ("train", "samples")}
    assert logits <= rows[-1].keys() and rows[-1]["select_bpd"] > 0
    assert {f"select_kl_{level}" for level in range(levels)} < rows[0].keys()
    other = dataclasses.replace(config.model, flow_width=4)
    with pytest.raises(RunError, match="does not fit the run"):
        load_warm_start(run, trainer(dataclasses.replace(config, model=other)))
    (run / WARM_NAME).write_bytes(b"cut")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match=f"{WARM_NAME} is not a safetensors file"):
        train(config, dataset, run, options, resume=True)


def test_an_interruption_waits_for_its_step_and_saves_it(folder, tmp_path, monkeypatch):
    dataset, run = load_dataset(str(folder), None, 8), tmp_path / "run"
    options = RunOptions(images=16 * 10, device="cpu", precision="float32")
    whole_step, fails = Trainer.run, False

    def interrupted(self, *given):
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


def test_an_interrupted_gan_can_only_sample(folder, tmp_path):
    """Until its inference network is trained; when it resumes, its past time counts."""
    dataset = load_dataset(str(folder), None, 8)

    def operations(out, images, resume=False, **changes):
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
    folder, tmp_path, monkeypatch, is_frozen
):
    """Whose training counts from the generator's last step, even if that was beyond the budget."""
    dataset, config, run = load_dataset(str(folder), None, 8), narrow("gan"), tmp_path / "run"

    def options(steps):
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


def test_what_is_refused_leaves_a_run_as_it_was(folder, tmp_path, small_images, caplog):
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


def test_a_start_that_failed_can_be_repeated(tmp_path):
    """Such as on a full disk, before run.json was written."""
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "data.json", {"data": "photos"})
    check_folder(run, False)
    (run / "metrics.jsonl").touch()
    with pytest.raises(RunError, match="holds metrics.jsonl, but no run"):
        check_folder(run, False)


def test_pytorch_gets_no_more_threads_than_cores(monkeypatch):
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
def test_an_export_leaves_the_number_of_threads_as_it_was(tiny_checkpoint, small_images, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        export_bundle(tiny_checkpoint, tmp_path / "out", "tiny", small_images[:40], None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_batches_do_not_depend_on_where_they_start(small_images):
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


@pytest.mark.parametrize("name, value", [("device", "gpu"), ("precision", "bf16")])
def test_misspelt_options_are_errors(name, value):
    with pytest.raises(RunError, match=f"{name} must be one of auto, .*, got '{value}'"):
        RunOptions(images=1, **{name: value})


def test_a_report_shows_density_samples_only_of_a_sigma_that_was_trained(folder, tmp_path):
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
def test_a_damaged_or_incomplete_checkpoint_is_named(tmp_path, name):
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


def test_damaged_json_is_named(tmp_path):
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
