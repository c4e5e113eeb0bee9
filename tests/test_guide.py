"""The guide: an encoder whose features samples match, read from its ONNX file."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from ade_cli.main import main
from tests.helpers import encoder_file, make_folder, narrow
from training import moments
from training.config import TrainConfig
from training.datasets import load_dataset
from training.guide import Guide, load_guide
from training.loop import train
from training.metrics.features import FeatureError
from training.metrics.frechet import frechet_distance
from training.moments import MomentMatching
from training.recipes import saw_efficientnet
from training.run_options import RunOptions
from training.runs import RunError, latest_checkpoint
from training.step import Trainer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_file(tmp_path_factory.mktemp("guide") / "encoder.onnx", 8)


@pytest.mark.parametrize("size, classes", [(8, 0), (32, 10), (64, 2)])
def test_a_guide_gives_the_features_of_its_file(tmp_path: Path, size: int, classes: int) -> None:
    """Of images in the model's range; beyond it, of the nearest ones."""
    path = encoder_file(tmp_path / "encoder.onnx", size, classes)
    guide = load_guide(path, size, 3)
    images = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8)
    x = ((images.permute(0, 3, 1, 2).float() + 0.5) / 256).requires_grad_(True)
    features = guide(x)
    assert features.shape == (3, guide.dims) and not list(guide.parameters())[0].requires_grad
    ours = guide._encoder.features(images)
    assert torch.allclose(features[:, -ours.shape[1] :], ours, atol=1e-4)
    (slope,) = torch.autograd.grad(features.square().sum(), x)
    assert slope.abs().sum() > 0
    white = torch.ones(1, 3, size, size)
    assert torch.equal(guide(7 * white), guide(white))


def test_a_file_that_is_no_guide_is_refused(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="must be for images of 16x16 pixels, got"):
        load_guide(encoder, 16, 3)
    with pytest.raises(FeatureError, match="of images with 1 channels"):
        load_guide(encoder, 8, 1)
    (tmp_path / "text.onnx").write_text("no network")
    for path in (tmp_path / "text.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(FeatureError, match="is not a readable ONNX file"):
            load_guide(path, 8, 3)
    model = onnx.load(encoder)
    model.graph.initializer[0].name = "another.weight"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(FeatureError, match="a guide must be a small encoder"):
        load_guide(tmp_path / "other.onnx", 8, 3)
    # The same weights in another graph.
    model = onnx.load(encoder_file(tmp_path / "other.onnx", 16))
    (node,) = [node for node in model.graph.node if node.op_type == "ReduceMean"]
    node.op_type = "ReduceMax"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(FeatureError, match="it gives other features"):
        load_guide(tmp_path / "other.onnx", 16, 3)


def test_matching_moves_features_to_the_real_distribution() -> None:
    """Points that follow the loss's gradient get the mean and the covariance of the real ones."""
    torch.manual_seed(0)
    mix, dims = torch.randn(6, 6), 6
    matching = MomentMatching(dims, lambda flat: flat)

    def real(n: int) -> torch.Tensor:
        return torch.randn(n, dims) @ mix + torch.arange(dims)

    shift, turn = torch.nn.Parameter(torch.zeros(dims)), torch.nn.Parameter(torch.eye(dims))
    optimizer = torch.optim.Adam([shift, turn], 0.02)
    held = real(4000)

    def distance() -> float:
        made = (torch.randn(4000, dims) @ turn + shift).detach()
        return frechet_distance(held.numpy().astype(float), made.numpy().astype(float))

    before, losses = distance(), []
    for _ in range(1200):
        made = torch.randn(48, dims) @ turn + shift
        matching.update(made.detach(), real(48) if matching.needs_real else None, 48)
        loss = matching.loss(made, 48)
        losses.append(loss.item())
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
            optimizer.step()
    first = moments.SCALING_STEPS + moments.MAPPING_STEPS
    assert not any(losses[: first - 1]) and all(losses[first:])
    assert distance() < 0.1 * before


def test_processes_may_have_features_of_different_numbers_of_images(at_once: None) -> None:
    """The moments and the loss are those of one process that has all of them."""
    torch.manual_seed(0)
    steps = [(torch.randn(3, 4), torch.randn(4, 4)) for _ in range(6)]
    meeting, sent = threading.Barrier(2), [torch.empty(0)] * 2

    def follow(matching: MomentMatching, parts: slice, real: slice) -> list[float]:
        found = []
        for made, of_real in steps:
            matching.update(made[parts], of_real[real] if matching.needs_real else None, 3)
            found.append(float(matching.loss(made[parts], 3)))
        return found

    def average(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def mean(flat: torch.Tensor) -> torch.Tensor:
            sent[rank] = flat
            meeting.wait()
            both = (sent[0] + sent[1]) / 2
            meeting.wait()
            return both

        return mean

    alone = MomentMatching(4, lambda flat: flat)
    expected = follow(alone, slice(3), slice(4))
    shared = [MomentMatching(4, average(rank), 2) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        losses = list(threads.map(follow, shared, (slice(1), slice(1, 3)), (slice(2), slice(2, 4))))
    assert np.mean(losses, axis=0) == pytest.approx(expected, rel=1e-5) and expected[-1] > 0
    for one in shared:
        for name, value in alone.state_dict().items():
            assert torch.allclose(one.state_dict()[name], value), name


def guided(**changes: Any) -> TrainConfig:
    return dataclasses.replace(
        narrow("av-ade"), guide_weight=0.5, cooldown=0.0, warmup_steps=1, **changes
    )


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map is known after two steps, and the loss has its weight."""
    for name in ("SCALING_STEPS", "MAPPING_STEPS", "GROWING_STEPS", "MAP_EVERY"):
        monkeypatch.setattr(moments, name, 1)
    monkeypatch.setattr(moments, "REAL_STEPS", 3)


def test_the_guide_trains_the_generator_alone(
    encoder: Path, small_images: np.ndarray, at_once: None
) -> None:
    guide = load_guide(encoder, 8, 3)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    config = guided(coverage=False, quality_weight=0.0)
    trainer = Trainer(config, torch.device("cpu"), nullcontext, lambda flat: flat, 0, guide=guide)
    model = {name: p.clone() for name, p in trainer.model.named_parameters()}
    batch = torch.from_numpy(small_images[:16])
    seen = [trainer.run([batch, batch])["moment_loss"] for _ in range(4)]
    assert seen[0] == 0 and all(value > 0 for value in seen[1:])
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, model[n])}
    assert moved and not any(name.startswith(("flow.", "encoder.")) for name in moved)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


def test_the_classifier_guides_beside_the_encoder(
    encoder: Path, small_images: np.ndarray, at_once: None
) -> None:
    """Each has moments of its own; either can be alone."""
    batch = torch.from_numpy(small_images[:16])
    gradients = {}
    for weights in ((0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
        config = guided(coverage=False, quality_weight=0.0, classifier_weight=weights[1])
        config = dataclasses.replace(config, guide_weight=weights[0])
        guide = load_guide(encoder, 8, 3) if weights[0] else None
        cpu = torch.device("cpu")
        trainer = Trainer(config, cpu, nullcontext, lambda flat: flat, 0, guide=guide)
        names = ("moment_loss", "classifier_loss")
        expected = [name for name, weight in zip(names, weights, strict=True) if weight]
        assert list(trainer.guides) == expected
        for _ in range(2):
            losses = trainer.run([batch, batch])
        assert all(losses[name] > 0 for name in expected)
        gradients[weights] = losses["grad_norm"]
    assert len(set(gradients.values())) == 3


def test_a_guided_run_resumes_with_its_own_guide(
    encoder: Path, small_images: np.ndarray, tmp_path: Path, at_once: None
) -> None:
    dataset = load_dataset(str(make_folder(tmp_path / "images", small_images)), None, 8)
    given = tmp_path / "encoder.onnx"
    given.write_bytes(encoder.read_bytes())
    options = RunOptions(images=16 * 6, device="cpu", precision="float32", guide=str(given))
    run, whole = tmp_path / "cut", tmp_path / "whole"
    config = guided(classifier_weight=0.5)
    train(config, dataset, whole, options, resume=False)
    train(config, dataset, run, dataclasses.replace(options, images=16 * 3), resume=False)
    encoder_file(given, 8, seed=1)  # another one by now
    train(config, dataset, run, options, resume=True)
    for name in (
        "model.safetensors",
        "moments.safetensors",
        "classifier_moments.safetensors",
        "discriminator.safetensors",
    ):
        a, b = (latest_checkpoint(folder) / name for folder in (run, whole))
        assert a.read_bytes() == b.read_bytes()
    assert (run / "guide.onnx").read_bytes() == encoder.read_bytes()


def test_a_run_without_a_guide_does_not_resume_with_one(
    encoder: Path, small_images: np.ndarray, tmp_path: Path
) -> None:
    """Although an encoder lies where its guide would be."""
    dataset = load_dataset(str(make_folder(tmp_path / "images", small_images)), None, 8)
    options = RunOptions(images=16, device="cpu", precision="float32")
    run = tmp_path / "run"
    train(narrow("av-ade"), dataset, run, options, resume=False)
    (run / "guide.onnx").write_bytes(encoder.read_bytes())
    assert train(narrow("av-ade"), dataset, run, options, resume=True).images == 16


@pytest.mark.parametrize(
    "weight, has_guide, message",
    [(0.0, True, "must be above 0 with a guide"), (0.5, False, "must be 0 without a guide")],
)
def test_a_guide_and_its_weight_go_together(
    encoder: Path,
    small_images: np.ndarray,
    tmp_path: Path,
    weight: float,
    has_guide: bool,
    message: str,
) -> None:
    dataset = load_dataset(str(make_folder(tmp_path / "images", small_images)), None, 8)
    config = dataclasses.replace(guided(), guide_weight=weight)
    options = RunOptions(images=16, device="cpu", guide=str(encoder) if has_guide else None)
    with pytest.raises(RunError, match=f"guide_weight {message}"):
        train(config, dataset, tmp_path / "run", options, resume=False)
    assert not (tmp_path / "run").exists()


def test_train_takes_a_guide(
    encoder: Path, small_images: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "images", small_images)
    common = ["--data", str(folder), "--image-size", "8", "--size", "tiny", "--batch-size", "16"]
    common += ["--images", "32", "--device", "cpu", "--guide", str(encoder), "--out"]
    widths = ["--widths", "8,8", "--latent-channels", "3,3", "--decoder-blocks", "1,1"]
    widths += ["--d-widths", "8,8", "--flow-width", "8"]
    run = tmp_path / "run"
    assert main(["train", "av-ade", *common, str(run), *widths]) == 0
    from ade_model.checkpoint import read_config

    about = read_config(latest_checkpoint(run))
    assert about["guided"] is True and about["training"]["guide_weight"] == 0.2
    assert saw_efficientnet(about) and saw_efficientnet({"recipe": "av", "started_from": about})
    assert not saw_efficientnet({"recipe": "av-ade"})
    place = common.index("--guide")  # a run is resumed with its own copy
    without = [*common[:place], *common[place + 2 :], str(run), *widths]
    assert main(["train", "av-ade", *without, "--resume", "--images", "48"]) == 0
    capsys.readouterr()
    assert main(["train", "vae", *common, str(tmp_path / "vae")]) == 2
    assert "--guide-weight must be 0 without a discriminator, got 0.2" in capsys.readouterr().err
    assert isinstance(load_guide(run / "guide.onnx", 8, 3), Guide)
    new = [*common, str(tmp_path / "new")]
    assert main(["train", "av-ade", *new, *widths, "--dry-run"]) == 0
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    for more, message in (
        (["--init", str(tmp_path / "nowhere")], "nowhere"),
        (["--guide", str(tmp_path / "junk.onnx")], "junk.onnx is not a readable ONNX file"),
        (["--guide", str(tmp_path / "missing.onnx")], "--guide must be a file, got"),
    ):
        assert main(["train", "av-ade", *new, *widths, *more, "--dry-run"]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", "av-ade", *new, *widths, *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
