"""From a folder to a served gate: what is decided, what is found in the folder, and the whole way once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ade_cli.main import main
from fitting.plan import Plan, PlanError, make_plan, read_budget
from fitting.survey import choose_image_size, folder_sizes, split_names, survey
from serving.bundle import verify_bundle
from serving.engine import InferenceEngine
from tests.conftest import ROOT, make_folder
from training.datasets.folder import load_folder


@pytest.mark.parametrize("text, minutes", [("20m", 20), ("1.5h", 90), ("2d", 2880), ("45", 45), (" 5m ", 5)])
def test_budgets(text: str, minutes: float) -> None:
    assert read_budget(text) == minutes


@pytest.mark.parametrize("text", ["", "x", "-5m", "0", "10s", "1h30m", "nan"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(PlanError, match="a budget is a time such as 20m"):
        read_budget(text)


def test_plans_fit_their_budget() -> None:
    both = ["v-ade", "av-ade"]
    for budget, on_gpu, recipes, size in ((1.2, False, both[:1], "tiny"), (20, False, both[:1], "tiny"),
                                          (120, False, both, "tiny"), (20, True, both, "small"),
                                          (600, False, both, "small")):
        plan = make_plan("/images", "images", 32, budget, on_gpu)
        licensed = make_plan("/images", "images", 32, budget, on_gpu, "CC0-1.0")
        assert Plan.from_dict(licensed.to_dict()).licence == "CC0-1.0" and licensed == plan and plan.licence is None
        assert [stage.recipe for stage in plan.stages] == recipes and plan.size == size
        assert 0 < sum(stage.minutes for stage in plan.stages) <= budget - 0.5
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(PlanError, match="too few"):
        make_plan("/images", "images", 32, 0.4, False)


@pytest.mark.parametrize("sizes, side", [
    ({(32, 32): 9}, 32), ({(640, 480): 5, (20, 20): 1}, 64), ({(50, 70): 5}, 48), ({(9, 9): 3}, 16), ({None: 4}, 16),
    ({(28, 28): 6, None: 2}, 24),
])
def test_the_size_suits_most_images(sizes: dict, side: int) -> None:
    assert choose_image_size(Counter(sizes)) == side


def test_what_a_folder_holds(tmp_path: Path, small_images: np.ndarray) -> None:
    folder = make_folder(tmp_path / "images", small_images)
    for i in range(30):
        shutil.copy(folder / "class0" / "0000.png", folder / f"copy{i}.png")
    dataset = load_folder(folder, 8, None, lambda line: None)
    names = split_names(folder, dataset)
    assert {part: len(rows) for part, rows in names.items()} == {part: len(s) for part, s in dataset.parts.items()}
    for part, rows in names.items():
        for row in (0, len(rows) - 1):
            pixels = np.asarray(Image.open(folder / rows[row]))
            if pixels.shape == (8, 8, 3):
                assert np.array_equal(pixels, dataset.parts[part].images[row])
    found = survey(folder, folder_sizes(folder), dataset, names)
    assert found.files == 333 and found.sizes == {"8 x 8": 330, "unreadable": 2, "40 x 20": 1}
    assert len(found.broken) == 2 and any(line.startswith("broken.png: ") for line in found.broken)
    (group,) = found.twice
    assert len(group) == 31 and "class0/0000.png" in group
    held_out = {name for part in ("select", "calibrate", "test") for name in names[part]}
    assert found.leaking and set(found.leaking) == held_out & set(group)
    assert sum(found.parts.values()) == 331 - len(found.leaking)
    assert [line.split(":")[0] for line in found.warnings[1:]] == [
        "Held-out files that are copies of others, left out of calibration and tests", "Files that could not be read",
        "Images that are not 8 x 8, whose centre squares were resized"]


@pytest.mark.parametrize("arguments, message", [
    (["NOWHERE"], "is no folder"), (["FEW", "--budget", "soon"], "a budget is a time"),
    (["FEW", "--budget", "5m"], "are left for the part select and 20 are needed"), (["EMPTY"], "holds no images"),
    (["FEW", "--image-size", "20"], "image_size"), (["TMP"], "--out must lie outside"),
])
def test_what_cannot_be_fitted(arguments: list[str], message: str, tmp_path: Path, small_images: np.ndarray,
                               capsys: pytest.CaptureFixture) -> None:
    make_folder(tmp_path / "few", small_images[:60])
    (tmp_path / "empty").mkdir()
    places = {"NOWHERE": tmp_path / "nowhere", "FEW": tmp_path / "few", "EMPTY": tmp_path / "empty", "TMP": tmp_path}
    given = [str(places.get(argument, argument)) for argument in arguments]
    assert main(["fit", *given, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_may_be_called_like_a_data_set(tmp_path: Path, small_images: np.ndarray, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture) -> None:
    make_folder(tmp_path / "cifar10", small_images[:10])
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "cifar10", "--out", "cifar10/fit"]) == 2 and "must lie outside" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_becomes_a_gate_and_goes_on_after_a_kill(tmp_path: Path, real_images: np.ndarray) -> None:
    both = np.concatenate([real_images, real_images[:, :, ::-1], 255 - real_images[:100]])
    folder = make_folder(tmp_path / "My images", both)
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"broken too")
    out = tmp_path / "fit"
    command = [sys.executable, "-m", "ade_cli.main", "fit", str(folder), "--out", str(out), "--budget", "1.2m"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "training v-ade" in line:
            break
    process.kill()
    process.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "704 image files" in done.stderr and f"serve it: ade serve {out / 'bundle'}" in done.stdout
    bundle = verify_bundle(out / "bundle")
    assert bundle.name == "my-images" and bundle.image_shape == (32, 32, 3)
    assert bundle.manifest["calibration"]["resize"] == "fit" and bundle.manifest["evaluation"]["elbo"]["bpd"] < 20
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    scores = InferenceEngine(bundle, device="cpu").score(noise)
    assert np.mean([score.verdict.p_value for score in scores]) < 0.1
    page = (out / "report.html").read_text()
    for words in ("False alarms", "broken.png", "caf\\udce9.png", "The most unusual", "data:image/png;base64,",
                  "bits per dimension"):
        assert words in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "training" not in again.stderr
    other = subprocess.run([*command, "--image-size", "16"], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 2 and "was begun for" in other.stderr
    Image.new("RGB", (32, 32)).save(folder / "another.png")
    changed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert changed.returncode == 2 and "has changed since" in changed.stderr
