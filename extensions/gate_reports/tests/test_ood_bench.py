"""``ade ood-bench`` and the report of ``ade calibrate``, with figures counted again here."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from ade_cli.advice import advice
from ade_cli.image_sets import GivenImages, name_of
from ade_cli.main import main, parse
from export.gate import images as images_module
from export.gate import pair as kinds
from export.gate import separation
from export.gate.calibrate import calibrate_bundle
from export.gate.corruptions import CORRUPTIONS, SUBTLE
from export.gate.images import NamedFile, others, usable
from export.gate.measuring import statistics_of
from export.gate.rejection import corruptions_of, rejected
from fitting.pipeline import ENOUGH
from serving.engine.engine import InferenceEngine
from serving.engine.noise import short_digest
from serving.gate import Gate
from serving.ingest.picture import Picture
from serving.page import charts
from serving.verdict.calibration import CalibrationError
from serving.verdict.calibration_file import CalibrationPair
from tests.helpers import PRETRAINED, ROOT, with_calibrations
from tests.test_imports import TRAINING_PACKAGES, without
from training.data import DataError


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    return InferenceEngine(tiny_bundle, device="cpu", operations=["score"])


def test_a_calibration_says_what_it_catches(engine, small_images, tmp_path):
    """As measured again from its images."""
    calibrations = engine.calibrations
    assert calibrations.exact is not None
    assert set(calibrations.exact.corrupted) == {*CORRUPTIONS, *SUBTLE}
    calibrating = small_images[150 : 150 + kinds.CORRUPTED]
    images, _ = usable("calibrating", calibrating, engine.image_shape, print)
    for name, its in corruptions_of(images):
        (share,) = rejected(engine, calibrations, its, [0.1])
        assert calibrations.exact.caught(0.1)[name] == pytest.approx(share), name
    assert calibrations.exact.caught(0.001) == {}  # 150 images cannot reject one in 1,000
    bare = dataclasses.replace(calibrations.exact, corrupted={})
    (tmp_path / "before.npz").write_bytes(CalibrationPair(bare, bare).to_bytes())
    before = CalibrationPair.load(tmp_path / "before.npz").exact
    assert before is not None and before.caught(0.1) == {}
    wrong = dataclasses.replace(bare, corrupted={"constant": np.array([1.0, np.nan])})
    with pytest.raises(CalibrationError, match="scores of 'constant' must be finite"):
        wrong.check_values()


def test_a_share_is_of_images_that_get_a_verdict(engine):
    """No share is given for a set with images of a kind that is not judged at this alpha."""
    exact = engine.calibrations.exact
    assert exact is not None
    fewer = dataclasses.replace(exact, scores=exact.scores[:50])
    small = np.zeros((8, 8, 3), np.uint8)
    larger = np.zeros((16, 16, 3), np.uint8)
    both, _ = usable("both", [small, larger], engine.image_shape, print)
    assert rejected(engine, CalibrationPair(exact, fewer), both[:1], [0.01]) != [None]
    assert rejected(engine, CalibrationPair(exact, fewer), both, [0.01]) == [None]
    assert rejected(engine, CalibrationPair(exact, fewer), both, [0.02]) != [None]
    assert rejected(engine, CalibrationPair(exact), both, [0.1]) == [None]


def test_the_page_shows_both(engine):
    calibration = engine.calibrations.exact
    assert calibration is not None
    shown = charts.what_if(calibration, 0.1, 1000)
    n, k = 150, 15
    low, high = (round(x) for x in stats.betabinom.ppf([0.025, 0.975], 1000, k, n + 1 - k))
    assert f"About {1000 * k / (n + 1):.0f} false alarms per day" in shown
    assert f"{low} to {high} with a probability of 95 %" in shown
    share = calibration.caught(0.1)["JPEG, quality 10"]
    assert (
        f'JPEG, quality 10</th><td class="ade-share"><span style="width: {100 * share:.1f}%'
        in shown
    )
    assert "No image can be rejected" in charts.what_if(calibration, 0.001, 1000)
    bare = dataclasses.replace(calibration, corrupted={})
    assert "does not say which corrupted images" in charts.what_if(bare, 0.1, 1000)


def test_a_terminal_that_lacks_letters_gets_the_result(
    tiny_bundle, small_images, tmp_path, monkeypatch
):
    Image.fromarray(small_images[0]).save(tmp_path / "σ.png")
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["score", "--bundle", str(tiny_bundle), str(tmp_path / "σ.png")]) == 0
    out.seek(0)
    assert "\\u03c3.png" in out.read()


def test_the_bench_judges_images_by_their_kind(tiny_bundle, small_images, tmp_path, capsys):
    """As requests do; and without the images that made the calibration."""

    def all_resized_are_rejected(of):
        assert of.resized is not None
        return dataclasses.replace(
            of, resized=dataclasses.replace(of.resized, scores=of.resized.scores - 1e6)
        )

    bundle = with_calibrations(tiny_bundle, tmp_path / "bundle", all_resized_are_rejected)
    fresh = np.ascontiguousarray(small_images[:60, :, ::-1] // 2)
    np.save(tmp_path / "id.npy", np.concatenate([small_images[140:160], fresh]))
    np.save(tmp_path / "larger.npy", fresh.repeat(2, 1).repeat(2, 2))
    words = ["ood-bench", str(bundle), "--id", str(tmp_path / "id.npy"), "--corrupted", "20"]
    words += ["--ood", str(tmp_path / "larger.npy")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "id.npy: left out 20 images that calibrated or trained" in capsys.readouterr().err
    report = (tmp_path / "out" / "report.md").read_text()
    assert "ID images: 60 of id.npy." in report and "| larger (60) | combined |" in report
    share = np.mean([decision.decision == "reject" for decision in Gate(bundle, 0.1).check(fresh)])
    assert f"| 0.1 | {share:.4f} |" in report and share < 1
    with open(tmp_path / "out" / "figures.csv", newline="") as file:
        rows = {row["ood_set"]: row for row in csv.DictReader(file) if row["score"] == "combined"}
    assert rows["larger"]["flagged_0.1"] == "1.0"


def test_the_bench_gives_no_verdict_without_a_calibration_for_resized_images(
    tiny_bundle, small_images, tmp_path
):
    bundle = with_calibrations(
        tiny_bundle, tmp_path / "bundle", lambda its: dataclasses.replace(its, resized=None)
    )
    fresh = np.ascontiguousarray(small_images[:60, :, ::-1] // 2)
    larger = fresh.repeat(2, 1).repeat(2, 2)
    np.save(tmp_path / "id.npy", fresh)
    np.save(tmp_path / "larger.npy", larger)
    words = ["ood-bench", str(bundle), "--corrupted", "20", "--id"]
    some = ["--ood", str(tmp_path / "larger.npy"), "--out", str(tmp_path / "some")]
    assert main([*words, str(tmp_path / "id.npy"), *some]) == 0
    report = (tmp_path / "some" / "report.md").read_text()
    assert "no calibration for resized images: they get no verdict" in report
    row = next(line for line in report.splitlines() if line.startswith("| larger (60) | combined"))
    assert row.count("no verdict") == len(separation.ALPHAS)
    row = next(line for line in report.splitlines() if line.startswith("| constant (20) | combin"))
    assert "no verdict" not in row.rsplit("|", 3)[0]
    with open(tmp_path / "some" / "figures.csv", newline="") as file:
        rows = {row["ood_set"]: row for row in csv.DictReader(file) if row["score"] == "combined"}
    assert rows["larger"]["flagged_0.1"] == "" != rows["constant"]["flagged_0.1"]
    assert main([*words, str(tmp_path / "larger.npy"), "--out", str(tmp_path / "all")]) == 0
    report = (tmp_path / "all" / "report.md").read_text()
    assert "60 resized images, calibrated on 0 others:" in report
    assert "| 0.1 | no verdict |" in report


def test_a_set_without_any_finite_likelihood_is_an_error(
    tiny_bundle, small_images, tmp_path, monkeypatch, capsys
):
    """The bench and the calibration leave out corrupted images without any."""
    statistics = InferenceEngine.statistics

    def lose(self, images, views=()):
        flat = (images == images[:, :1, :1]).all((1, 2, 3))
        found = statistics(self, images, views)
        return {**found, "bpd": np.where(flat, np.float32(np.nan), found["bpd"])}

    monkeypatch.setattr(InferenceEngine, "statistics", lose)
    engine = InferenceEngine(tiny_bundle, device="cpu", operations=["score"])
    flat = np.full((3, 8, 8, 3), 9, np.uint8)
    with pytest.raises(CalibrationError, match="flat: none of 3 images could be used: image 0"):
        statistics_of(engine, flat, "flat")
    np.save(tmp_path / "id.npy", flat)
    words = ["ood-bench", str(tiny_bundle), "--id", str(tmp_path / "id.npy")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    reason = "image 0: its likelihood or another statistic is not a finite number"
    assert capsys.readouterr().err.endswith(f"could be used: {reason} (as for 2 others)\n")
    np.save(tmp_path / "id.npy", small_images[:20] // 2)
    words = ["ood-bench", str(tiny_bundle), "--id", str(tmp_path / "id.npy")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "left out constant: none of 20 images could be used" in capsys.readouterr().err
    assert "| constant" not in (tmp_path / "out" / "report.md").read_text()
    calibrating = (small_images[:60], small_images[60:120])
    made = calibrate_bundle(tiny_bundle, tmp_path / "new", *calibrating, "corners")
    assert made.exact is not None
    assert set(made.exact.corrupted) == {*CORRUPTIONS, *SUBTLE} - {"constant"}


def test_images_are_decoded_on_several_cores_and_named(small_images, monkeypatch):
    monkeypatch.setattr(images_module, "available_cores", lambda: 2)
    both, prepare = threading.Barrier(2), images_module.prepare_source

    def meet(*given):
        both.wait(10)
        return prepare(*given)

    monkeypatch.setattr(images_module, "prepare_source", meet)
    lines: list[str] = []
    junk = [NamedFile.of(f"{i}.png", b"junk") for i in range(7)]
    given = [*junk, small_images[0]]
    found, errors = usable("photos", given, (8, 8, 3), lines.append)
    assert len(found) == 1 and len(errors) == 7
    (line,) = lines
    assert line.startswith("photos: left out 7 images: 0.png: not an image")
    assert "4.png" in line and "5.png" not in line and line.endswith("; …")


def test_sets_of_images_are_read_by_their_content(small_images, tmp_path):
    np.savez(tmp_path / "arrays.npz", images=small_images[:3])
    for name in ("arrays.NPZ", "arrays.npy", "arrays"):
        shutil.copy(tmp_path / "arrays.npz", tmp_path / name)
        assert len(list(GivenImages(tmp_path / name, None))) == 3
    # A folder has a name by which reports know it, and a link its own.
    assert name_of(Path(".")) == Path.cwd().name
    (tmp_path / "svhn").symlink_to(tmp_path, target_is_directory=True)
    assert name_of(tmp_path / "svhn") == "svhn"
    # The first images of a file are often of one class.
    np.save(tmp_path / "ordered.npy", np.repeat(small_images[:10], 20, axis=0))
    some = {image.tobytes() for image in GivenImages(tmp_path / "ordered.npy", 20)}  # type: ignore[union-attr]
    assert len(some) > 2
    # Each is read when it is used, since the file may be larger than memory.
    assert not any(image.flags.writeable for image in GivenImages(tmp_path / "ordered.npy", 20))  # type: ignore[union-attr]
    Image.fromarray(small_images[0]).save(tmp_path / "image.png")
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "arrays.npz").read_bytes()[:100])
    # When a set is made, because the images of others may be scored before it is read.
    with pytest.raises(DataError, match="image.png must be a folder of images, an .npy or an .npz"):
        GivenImages(tmp_path / "image.png", None)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    with pytest.raises(DataError, match="pipe must be a folder of images or a regular file"):
        GivenImages(tmp_path / "pipe", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images"):
        GivenImages(tmp_path / "empty", None)
    with ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("a.txt", "a text")
    with pytest.raises(DataError, match="texts.zip must hold one array of images"):
        GivenImages(tmp_path / "texts.zip", None)
    with pytest.raises(DataError, match="damaged.npz cannot be read"):
        GivenImages(tmp_path / "damaged.npz", None)


def test_options_given_twice_add_up():
    words = ["ood-bench", "B", "--id", "D", "--out", "O"]
    args = parse([*words, "--ood", "a", "b", "--ood", "c"])
    assert args.ood == [Path("a"), Path("b"), Path("c")]
    assert parse(["compare", "--out", "O", "--seeds", "1", "--seeds", "2"]).seeds == [1, 2]


def test_an_empty_path_is_not_the_current_folder(capsys):
    """As a variable gives it that is not set: images of that folder would join a calibration."""
    for words in (
        ["ood-bench", "B", "--out", "O", "--id", ""],
        ["calibrate", "B", "O", "--data", ""],
        ["score", "--bundle", "B", "--out", "t.csv", ""],
        ["encode", "--bundle", "B", "--out", "z.npz", ""],
        ["compress", "--bundle", "B", "", "O.ade"],
        ["publish", ""],
        ["serve", ""],
        ["calibrate", "", "O", "--data", "D"],
        ["calibrate", "B", "", "--name", "N", "--data", "D"],
        ["score", "--bundle", "", "a.png"],
        ["score", "--bundle", "B", "--engine", "ray", "D", "--out", ""],
        ["score", "--bundle", "B", "--engine", "ray", "D", "--out", "O", "--address", ""],
        ["fit", ""],
    ):
        with pytest.raises(SystemExit) as raised:
            parse(words)
        assert raised.value.code == 2 and "must not be empty" in capsys.readouterr().err, words


def test_a_report_does_not_lie_among_its_images(tmp_path, monkeypatch, capsys):
    """Even if their folder is called like a data set."""
    monkeypatch.chdir(tmp_path)
    words = ["ood-bench", str(PRETRAINED), "--id", "x.npy", "--ood", "cifar10"]
    assert main([*words, "--out", "cifar10/out"]) == 2
    assert "--out must lie outside of" in capsys.readouterr().err


def test_a_report_replaces_none_of_another_program(tiny_bundle, tmp_path, capsys):
    """And this is known before any image is scored."""
    out, sets = tmp_path / "out", [tmp_path / "scenes.2024", tmp_path / "scenes.2025"]
    words = ["ood-bench", str(tiny_bundle), "--id", "nowhere", "--out", str(out)]
    out.touch()
    assert main(words) == 2 and f"folder, and {out} is a file" in capsys.readouterr().err
    out.unlink()
    out.mkdir()
    (out / "report.html").touch()
    assert main(words) == 2
    assert f"{out} holds report.html, but no figures.csv" in capsys.readouterr().err
    (out / "figures.csv").touch()  # of an earlier report
    for folder in sets:
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    assert main([*words, "--ood", *map(str, sets)]) == 2
    assert "there is no nowhere" in capsys.readouterr().err


def test_advice_on_a_weak_gate():
    good = {**dict.fromkeys(CORRUPTIONS, 1.0), **dict.fromkeys(SUBTLE, 0.8)}
    assert advice(500, True, good) == []
    # Of none of these images a likelihood could be computed: they cannot be accepted.
    assert advice(500, True, {name: 1.0 for name in CORRUPTIONS if name != "uniform noise"}) == []
    (few,) = advice(499, True, good)
    assert "1,000 images or more" in few
    (blind,) = advice(500, False, good)
    assert "ade encoder" in blind
    for weak, named in (
        ({**good, "constant": 0.89}, "(constant)"),
        ({**good, "constant": None}, "(constant)"),
        ({**good, **dict.fromkeys(SUBTLE, 0.5)}, f"({'; '.join(SUBTLE)})"),
    ):
        (line,) = advice(600, True, weak)
        assert named in line and "ade fit DIR" in line
        assert f"at least {ENOUGH} images" in line


def test_calibrate_needs_no_pytorch(tmp_path):
    """Makes a gate without PyTorch; the report has false alarms and detection."""
    files = np.asarray(Image.open(ROOT / "tests/data/cifar10_test_300.webp").convert("RGB"))
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(files.reshape(-1, 32, 32, 3)[:60]):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
    packages = tuple(set(TRAINING_PACKAGES) - {"scipy", "sklearn"})
    fewer = "from export.gate import pair; pair.CORRUPTED = 2; "
    words = ["calibrate", PRETRAINED, tmp_path / "mine", "--data", tmp_path / "photos"]
    script = f"{without(*packages)}{fewer}import ade_cli.main"
    script += f"; sys.exit(ade_cli.main.main({[*map(str, words)]}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stderr
    assert "left out for ade ood-bench: 7 of 60 files\n" in said
    assert "53 images: 21 fit the density of statistics, 32 set the false-alarm rate\n" in said
    assert "  alpha 0.1: " in said and "  constant: " in said and "no verdict" in said
    assert "next step: calibrate on 1,000 images or more" in said
    assert (tmp_path / "mine" / "manifest.json").is_file()


def test_a_picture_that_repeats_is_measured_although_it_calibrated(small_images):
    image, told = Picture(small_images[0], []), list[str]()
    known = {short_digest(image.pixels)}
    left = list(others("id", [(str(i), image) for i in range(6)], known, told.append))
    assert [name for name, _ in left] == ["4", "5"] and "left out 4 images" in told[0]
