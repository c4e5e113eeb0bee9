"""``ade train`` and the verbs that follow it, on small images."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ade_base.files import LOCK
from ade_cli.main import VERBS, main
from ade_model.checkpoint import save_model
from ade_model.model import ADEModel
from serving.engine.bundle import verify_bundle
from tests.helpers import ROOT, held_by_another, make_folder, narrow
from tests.test_docs import ade_commands
from tests.training_runs import NARROW, TRAIN, trained_on
from training.datasets import load_dataset
from training.recipes import recipe
from training.run_options import NO_LIMIT, RunOptions
from training.run_start import WRITTEN, open_run
from training.runs import Progress
from training.step import TrainingDiverged


@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_replaces_no_file_of_another_program(name, folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    words = ["train", "vae", "--data", str(folder), "--image-size", "8", "--out", str(out)]
    assert main(words) == 2
    assert f"{out} holds {name}, but no run that can be resumed" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "mine"


def test_a_resumed_run_keeps_its_image_size(folder, tmp_path, capsys):
    photos, run = Path(shutil.copytree(folder, tmp_path / "photos")), tmp_path / "run"
    dataset = load_dataset(str(photos), None, 8)
    open_run(run, recipe("vae", 8, 3), dataset, RunOptions(images=16), None)
    Image.new("RGB", (16, 16)).save(photos / "0.png")  # the first image now
    words = ["train", "vae", "--data", str(photos), "--out", str(run), "--resume", "--dry-run"]
    assert main(words) == 0
    assert main([*words, "--image-size", "16"]) == 2
    assert "it was started with image_size 8, now 16\n" in capsys.readouterr().err


def test_a_run_that_diverged_says_how_to_start_again(folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"

    def diverge(*given):
        raise TrainingDiverged("step 9: why")

    monkeypatch.setattr("ade_cli.train.train", diverge)
    assert main(["train", "vae", "--data", str(folder), *TRAIN, "--out", str(run)]) == 2
    said = "step 9: why; --resume would repeat the same steps: start again with another --out, and"
    assert said in capsys.readouterr().err


def test_a_run_has_one_process(folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with held_by_another(out / LOCK):
        for verb in (["train", "vae", "--data"], ["fit"]):
            assert main([*verb, str(folder), "--image-size", "16", "--out", str(out)]) == 2
            assert "is in use by another process" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [LOCK]


def test_a_dry_run_writes_nothing(folder, tmp_path, monkeypatch, capsys):
    for verb, entry in VERBS.items():  # another one would need a test
        parser = argparse.ArgumentParser()
        importlib.import_module(entry.module).add_arguments(parser)
        assert ("--dry-run" in parser.format_help()) == (verb == "train")
    monkeypatch.chdir(tmp_path)

    def tree():
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


@pytest.mark.slow
def test_images_to_bundle_and_back(tmp_path, small_images, monkeypatch, capfd):
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


def test_a_resumed_run_keeps_its_budget_device_and_cadence(folder, tmp_path, monkeypatch, capsys):
    seen: list[tuple[Any, ...]] = []

    def note(config, dataset, run, options, *rest):
        cadence = (options.device, options.checkpoint_steps, options.evaluate_steps)
        seen.append((options.images, options.minutes, *cadence))
        open_run(run, config, dataset, options, None)
        return Progress()

    monkeypatch.setattr("ade_cli.train.train", note)
    arguments = ["train", "vae", "--data", str(folder), "--image-size", "8", "--out"]
    cases: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("a", (1_000_000, None, "auto", 1000, 1000)),
        ("b --images 64 --minutes 2 --device cpu", (64, 2, "cpu", 1000, 1000)),
        ("b --resume", (64, 2, "cpu", 1000, 1000)),
        ("b --resume --images 128 --device auto", (128, None, "auto", 1000, 1000)),
        ("c --minutes 5 --checkpoint-steps 7", (NO_LIMIT, 5, "auto", 7, 1000)),
        ("c --resume --evaluate-steps 3", (NO_LIMIT, 5, "auto", 7, 3)),
        ("c --resume", (NO_LIMIT, 5, "auto", 7, 3)),
    )
    monkeypatch.chdir(tmp_path)
    for words, expected in cases:
        assert main([*arguments, *words.split()]) == 0 and seen[-1] == expected
    assert main([*arguments, "c", "--resume", "--minutes", "9"]) == 2
    assert f"minutes became {NO_LIMIT:,} images when c was started" in capsys.readouterr().err


@pytest.fixture(scope="module")
def made_before(folder, tmp_path_factory):
    """A run of those images, ``old``, and a checkpoint without its data, ``model``."""
    made = tmp_path_factory.mktemp("before")
    trained_on(folder, made / "old")
    (made / "model").mkdir()
    save_model(ADEModel(narrow("vae").model), made / "model", {"recipe": "vae"})
    return made


@pytest.fixture
def no_decoding(monkeypatch):
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
    words, message, folder, made_before, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made_before, "IN")
    assert main([*words.split(), "--data", str(folder)]) == 2
    assert message in capsys.readouterr().err and not Path("IN", "new").exists()


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
    words, remedy, monkeypatch, capsys
):
    def out_of_memory(args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    verb = words.split()[0]
    monkeypatch.setattr(f"ade_cli.{verb}.run", out_of_memory)
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert said == f"ade {verb}: the GPU has too little memory: give {remedy}\n"


def test_a_run_does_not_resume_on_another_folder_of_the_same_name(
    folder, tmp_path, monkeypatch, capsys
):
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


def test_an_image_size_that_the_user_did_not_give_is_explained(tmp_path, capsys):
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
            "--set: 'flip' is none of alone_steps, augment, batch_",
        ),
        (
            "train vae --data DATA --out OUT --set coverage=0",
            "--set: 'coverage' is none of alone_steps, augment",
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
def test_the_command_line_says_what_is_wrong(words, message, folder, tmp_path, capsys):
    """In this process, because each new one would load PyTorch."""
    places = {"DATA": folder, "DATA/run": folder / "run"}
    places |= {"OUT": tmp_path / "out", "OUT2": tmp_path / "out2"}
    try:
        status: object = main([str(places.get(word, word)) for word in words.split()])
    except SystemExit as ended:  # of the parser
        status = ended.code
    printed = capsys.readouterr()
    assert status == 2 and message in printed.err and not printed.out
