"""``ade evaluate``: which figures it measures, prints and keeps."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from ade_cli.data_options import dataset_of_run
from ade_cli.main import main
from export.write import evaluation_of
from tests.helpers import make_folder
from tests.training_runs import trained_on
from training.datasets.files import part_of
from training.runs import latest_checkpoint


@pytest.fixture
def run(folder, tmp_path):
    """A short run on the images of ``folder``."""
    return trained_on(folder, tmp_path / "run")


def test_a_checkpoint_is_measured_like_its_run_and_keeps_the_better_figures(run, capsys):
    checkpoint = latest_checkpoint(run)
    for place, count, kept in ((checkpoint, 6, 6), (run, 4, 6), (checkpoint, 7, 7)):
        given = ["--final", "--images", str(count), "--device", "cpu"]
        assert main(["evaluate", str(place), *given]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["test"]["images"] == count
        assert json.loads((checkpoint / "evaluation.json").read_text())["test"]["images"] == kept
        assert ("evaluation.json is kept" in printed.err) == (count < kept)
    assert (run / "cache").is_dir() and not (checkpoint / "cache").exists()


def test_figures_of_a_checkpoint_that_was_replaced_are_printed(run, monkeypatch, capsys):
    """As a training does that still runs."""
    checkpoint = latest_checkpoint(run)

    def replace(*given):
        shutil.rmtree(checkpoint)
        return dataset_of_run(*given)

    monkeypatch.setattr("ade_cli.evaluate.dataset_of_run", replace)
    given = ["evaluate", str(run), "--images", "4", "--final", "--device", "cpu"]
    assert main(given) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["test"]["images"] == 4 and not checkpoint.exists()
    assert f"{checkpoint} was replaced by a newer checkpoint meanwhile" in printed.err


def test_copies_of_training_images_are_counted(small_images, tmp_path, capsys):
    folder = make_folder(tmp_path / "images", small_images[:40])
    files = sorted(folder.rglob("*.png"))
    trained = next(file for file in files if part_of(file.name) == "train")
    for file in [file for file in files if part_of(file.name) == "test"][:2]:
        shutil.copy(trained, file)
    run = trained_on(folder, tmp_path / "run")
    assert main(["evaluate", str(run), "--final", "--device", "cpu"]) == 0
    assert "\n2 of " in (said := capsys.readouterr().err)
    assert " images are copies of training images" in said


def test_figures_are_stored_by_part_and_are_not_lost(folder, run, tmp_path, monkeypatch, capsys):
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


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_a_bundle_names_its_data_but_not_their_place(verb, tiny_bundle, tmp_path, capsys):
    out = [str(tmp_path / "out")] if verb == "export" else []
    assert main([verb, str(tiny_bundle), *out]) == 2
    assert f"{tiny_bundle} does not record where its images are" in capsys.readouterr().err
