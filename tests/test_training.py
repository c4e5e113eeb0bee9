"""Training on small runs: it learns, resumes to the same losses, survives kill -9, and runs on several processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ade_model import ModelConfig
from ade_model.checkpoint import load_model
from tests.conftest import ROOT, TINY
from training.data import DataError, ImageSet, load_dataset, part_of
from training.discriminator import Discriminator, DiscriminatorConfig
from training.losses import discriminator_loss, gradient_penalty, quality_loss
from training.recipes import TrainConfig, recipe, recipe_names
from training.runs import RunError, latest_checkpoint
from training.step import Trainer, TrainingDiverged

SMALL = dataclasses.replace(
    recipe("av-ade", 8, 3), model=TINY, discriminator=DiscriminatorConfig(widths=(8, 8)), batch_size=16)


def trainer(config: TrainConfig = SMALL, seed: int = 0) -> Trainer:
    return Trainer(config, torch.device("cpu"), nullcontext, lambda flat: flat, seed)


def batches(images: np.ndarray, steps: int, config: TrainConfig = SMALL) -> list[list[torch.Tensor]]:
    source = ImageSet(images).batches(config.batch_size, 0)
    count = 1 + (config.d_steps if config.discriminator else 0)
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
    assert all(not torch.equal(a, b) for a, b in zip(d_before, trained.discriminator.parameters(), strict=True))
    assert sum(not torch.equal(before[n], p) for n, p in trained.model.named_parameters()) > 0.8 * len(before)


def gradients_of_one_step(trained: Trainer, images: np.ndarray) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}

    def look() -> None:
        seen.update({n: p.grad.clone() for n, p in trained.model.named_parameters()})

    trained.optimizer.step = look
    trained.run(batches(images, 1)[0])
    return seen


@pytest.mark.parametrize("sees", [False, True])
def test_the_flow_gets_the_likelihood_gradient_alone(small_images: np.ndarray, sees: bool) -> None:
    """Its update is that of weight zero unless the option says otherwise; the decoder's is not."""
    updates = {}
    for weight in (0.0, 50.0):
        trained = trainer(dataclasses.replace(SMALL, quality_weight=weight, flow_sees_quality=sees, max_grad_norm=1e9))
        updates[weight] = gradients_of_one_step(trained, small_images)
    flow = [n for n in updates[0.0] if n.startswith("flow.")]
    decoder = [n for n in updates[0.0] if n.startswith("decoder.to_mean")]
    assert all(torch.allclose(updates[0.0][n], updates[50.0][n], atol=1e-6) for n in flow) != sees
    assert not any(torch.allclose(updates[0.0][n], updates[50.0][n], atol=1e-6) for n in decoder)


@pytest.mark.parametrize("change", [
    {"batch_size": 8}, {"learning_rate": 1e-2}, {"beta1": 0.0}, {"warmup_steps": 1}, {"quality_weight": 5.0},
    {"flow_sees_quality": True}, {"d_learning_rate": 1e-2}, {"d_steps": 2}, {"gp_weight": 10.0}, {"gp_target": 1.0},
    {"gp_every": 2}, {"ema_decay": 0.05}, {"max_grad_norm": 1e-3}, {"flips": False}])
def test_every_option_changes_the_outcome(small_images: np.ndarray, change: dict) -> None:
    def outcome(config: TrainConfig) -> torch.Tensor:
        trained = trainer(config)
        for b in batches(small_images, 4, config):
            trained.run(b)
        return torch.cat([p.flatten() for p in trained.ema.parameters()])
    assert not torch.equal(outcome(SMALL), outcome(dataclasses.replace(SMALL, **change)))


def test_losses_that_are_not_finite_stop_the_run(small_images: np.ndarray) -> None:
    trained = trainer()
    (batch,) = batches(small_images, 1)
    with torch.no_grad():
        trained.model.decoder.log_sigma.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="not finite: .*bpd"):
        trained.run(batch)


def test_an_outlier_is_skipped_and_many_stop_the_run(small_images: np.ndarray) -> None:
    trained = trainer(dataclasses.replace(SMALL, discriminator=None))
    (batch,) = batches(small_images, 1, dataclasses.replace(SMALL, discriminator=None))
    trained.step = 100
    trained.usual_norm["model"] = 1e-9
    before = [p.clone() for p in trained.model.parameters()]
    trained.run(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, trained.model.parameters(), strict=True))
    with pytest.raises(TrainingDiverged, match="20 steps on end"):
        for _ in range(20):
            trained.run(batch)


def test_losses() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 1.0])
    d_real, d_fake = real.sigmoid(), fake.sigmoid()
    expected = -(d_real.log().mean() + (1 - d_fake).log().mean())
    assert torch.allclose(discriminator_loss(real, fake), expected)
    assert torch.allclose(quality_loss(fake), -(d_fake.log() - (1 - d_fake).log()).mean(), atol=1e-6)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_gradient_penalty(target: float) -> None:
    linear = torch.nn.Linear(12, 1)
    discriminator = torch.nn.Sequential(torch.nn.Flatten(), linear, torch.nn.Flatten(0))
    penalty = gradient_penalty(discriminator, torch.rand(5, 3, 2, 2), target)
    assert penalty.item() == pytest.approx((linear.weight.norm().item() - target) ** 2, rel=1e-4)
    penalty.backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("residual", [False, True])
def test_discriminator_shapes(residual: bool) -> None:
    for size in (32, 48, 64):
        discriminator = Discriminator(DiscriminatorConfig(widths=(4, 4, 4), residual=residual), size, 3)
        assert discriminator(torch.rand(2, 3, size, size)).shape == (2,)


@pytest.mark.parametrize("name", list(recipe_names()))
def test_recipes_are_complete_and_survive_json(name: str) -> None:
    config = recipe(name, 32, 3)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (config.discriminator is not None) == name.startswith("av-")
    assert (config.model.flow_scales > 0) == name.endswith("ade")


def test_unknown_recipe() -> None:
    with pytest.raises(ValueError, match="no recipe 'x'; there are vae"):
        recipe("x", 32, 3)


def test_batches_do_not_depend_on_where_they_start(small_images: np.ndarray) -> None:
    images = ImageSet(small_images)
    whole = images.batches(32, seed=1)
    first = [next(whole) for _ in range(25)]
    late = images.batches(32, seed=1, first_batch=20)
    assert np.array_equal(first[20], next(late)) and np.array_equal(first[21], next(late))
    epoch = np.concatenate(first)[:300]
    order = [[i.tobytes() for i in np.concatenate(first)[start:start + 300]] for start in (0, 300)]
    shared = set(order[0][:64]) & set(order[1][:64])
    assert len(shared) < 30  # two epochs are two orders: 14 of 64 meet by chance
    assert sorted(i.tobytes() for i in epoch) == sorted(i.tobytes() for i in small_images)


def make_folder(folder: Path, images: np.ndarray) -> Path:
    """A folder of class folders, with what people's folders hold."""
    for i, image in enumerate(images):
        target = folder / f"class{i % 3}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target / f"{i:04d}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("not an image")
    Image.new("L", (40, 20), 90).save(folder / "wide.png")
    return folder


def test_any_folder_of_images(tmp_path: Path, small_images: np.ndarray) -> None:
    folder = make_folder(tmp_path / "images", small_images[:120])
    said: list[str] = []
    dataset = load_dataset(str(folder), None, 8, cache=tmp_path / "cache", report=said.append)
    assert sum(len(part) for part in dataset.parts.values()) == 121
    assert len(dataset.parts["train"]) > 70 and all(len(p) for p in dataset.parts.values())
    assert [line.split(":")[0] for line in dataset.skipped] == ["broken.png", "empty.jpg"]
    assert any("skipped" in line and "broken.png" in line for line in said)
    again = load_dataset(str(folder), None, 8, cache=tmp_path / "cache")
    in_memory = load_dataset(str(folder), None, 8)
    for part, images in dataset.parts.items():
        for other in (again, in_memory):
            assert np.array_equal(images.images[:], other.parts[part].images[:])


def test_parts_follow_the_file_name() -> None:
    assert part_of("0001.png") == part_of("0001.png")
    counts = {part: sum(part_of(f"{i}.png") == part for i in range(5000)) / 50 for part in
              ("train", "select", "calibrate", "test")}
    assert counts == pytest.approx({"train": 80, "select": 4, "calibrate": 8, "test": 8}, abs=2)


@pytest.mark.parametrize("data, root, message", [
    ("cifar10", None, "needs --root DIR"), ("nowhere", None, "no data set and no folder"), ("cifar10", ".", "no CIFAR-10"),
    (".", "x", "--root goes with a named data set")])
def test_data_that_is_not_there(tmp_path: Path, data: str, root: str | None, message: str) -> None:
    os.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        load_dataset(data, root)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="holds no images"):
        load_dataset(str(tmp_path), None)


def test_a_pickle_that_is_no_array_is_refused(tmp_path: Path) -> None:
    import pickle
    for name in ("data_batch_1",):
        (tmp_path / name).write_bytes(pickle.dumps({b"data": print}))
    with pytest.raises(DataError, match="builtins.print, which is no array"):
        load_dataset("cifar10", str(tmp_path))


def ade(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ade_cli.main", *arguments], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


TRAIN = ("--size", "8", "--batch-size", "16", "--precision", "float32", "--checkpoint-steps", "20",
         "--evaluate-steps", "50")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_images: np.ndarray) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "images", small_images)


def losses_of(run: Path) -> dict[int, tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["bpd"], row.get("d_loss"), row.get("quality_loss")) for row in rows if "bpd" in row}


@pytest.mark.slow
def test_kill_9_and_resume_reach_the_same_losses(folder: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ["train", "av-ade", "--data", str(folder), *TRAIN, "--images", str(16 * 90)]
    done = ade(*arguments, "--out", str(whole))
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen([sys.executable, "-m", "ade_cli.main", *arguments, "--out", str(cut)], cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not list((cut / "checkpoints").glob("step-00000004*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    refused = ade(*arguments, "--out", str(cut))
    assert refused.returncode == 2 and "--resume goes on with it" in refused.stderr
    other = ade(*arguments, "--out", str(cut), "--resume", "--quality-weight", "3")
    assert other.returncode == 2 and "started with another config" in other.stderr
    resumed = ade(*arguments, "--out", str(cut), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert losses_of(cut) == losses_of(whole) and max(losses_of(whole)) == 90
    report = (whole / "report.md").read_text()
    assert "broken.png" in report and "pictures/samples-mean.png" in report
    assert (whole / "pictures" / "samples-mean.png").is_file() and list((whole / "tensorboard").iterdir())
    a, b = (load_model(latest_checkpoint(run)).state_dict() for run in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_two_processes_train_as_one(folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["train", "v-ade", "--data", str(folder), *TRAIN, "--images", str(16 * 30), "--device", "cpu"]
    assert ade(*arguments, "--out", str(one)).returncode == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                           "ade_cli.main", *arguments, "--out", str(two)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    a, b = losses_of(one), losses_of(two)
    assert a.keys() == b.keys()
    assert a[30][0] == pytest.approx(b[30][0], abs=0.5)  # the noise differs by rank, the learning does not


@pytest.mark.slow
@pytest.mark.parametrize("name", list(recipe_names()))
def test_every_recipe_trains_evaluates_exports_and_starts_again(name: str, folder: Path, tmp_path: Path) -> None:
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    done = ade("train", name, "--data", str(folder), *TRAIN, "--images", "320", "--out", str(run))
    assert done.returncode == 0, done.stderr
    evaluated = ade("evaluate", str(run), "--samples", "3")
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads(evaluated.stdout)
    assert result["part"] == "test" and result["iwae-3"]["bpd"] < result["elbo"]["bpd"] + 0.05
    exported = ade("export", str(run), str(bundle))
    assert exported.returncode == 0, exported.stderr
    assert json.loads((bundle / "manifest.json").read_text())["evaluation"]["elbo"] == result["elbo"]
    strangers = tmp_path / "strangers"
    strangers.symlink_to(folder)
    calibrated = ade("calibrate", str(bundle), "--data", str(strangers))
    assert calibrated.returncode == 0 and "calibrated on 150 images" in calibrated.stderr, calibrated.stderr
    again = ade("train", name, "--data", str(folder), *TRAIN, "--images", "32", "--init", str(bundle), "--out",
                str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 48, 64])
def test_sizes_train_and_export(size: int, real_images: np.ndarray, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", real_images[:60])
    done = ade("train", "av-ade", "--data", str(folder), "--size", str(size), "--images", "32", "--batch-size", "16",
               "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    exported = ade("export", str(tmp_path / "run"), str(tmp_path / "bundle"))
    assert exported.returncode == 0, exported.stderr


def test_init_refuses_another_architecture(tiny_checkpoint: Path) -> None:
    from training.runs import start_from
    other = trainer(dataclasses.replace(SMALL, model=ModelConfig(image_size=8, widths=(8,), latent_channels=(2,),
                                                                 decoder_blocks=(1,))))
    with pytest.raises(RunError, match="another architecture"):
        start_from(tiny_checkpoint, other)


@pytest.mark.parametrize("arguments, message", [
    (["train", "av-ade", "--data", "DATA", "--size", "50", "--out", "OUT"], "image_size must be a multiple of 8"),
    (["train", "av-ade", "--data", "nowhere", "--out", "OUT"], "no data set and no folder is called 'nowhere'"),
    (["train", "av-ade", "--data", "DATA", "--images", "0", "--out", "OUT"], "--images must be at least 1"),
    (["train", "av-ade", "--data", "DATA", "--size", "8", "--resume", "--out", "OUT"], "holds no run"),
    (["train", "best", "--data", "DATA", "--out", "OUT"], "invalid choice: 'best'"),
    (["evaluate", "OUT"], "holds no finished checkpoint"),
    (["export", "OUT", "OUT2"], "holds no finished checkpoint"),
    (["calibrate", "OUT", "--data", "DATA"], "is no bundle"),
    (["serve", "OUT"], "is no bundle"),
])
def test_the_command_line_says_what_is_wrong(arguments: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    names = {"DATA": str(folder), "OUT": str(tmp_path / "out"), "OUT2": str(tmp_path / "out2")}
    done = ade(*[names.get(a, a) for a in arguments])
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
