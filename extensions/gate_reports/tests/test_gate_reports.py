"""The reports and tables of ade ood-bench."""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from ade_cli import calibrate as calibrate_command
from ade_cli.main import main
from export.gate.measuring import Measured, statistics_of
from export.gate.separation import COMBINED, NO_FEATURES, RAW_BPD, Figures
from extensions.gate_reports.ood_bench_report import _histogram, _write_csv, write_report
from extensions.gate_reports.verbs import ood_bench
from serving.engine.bundle import open_bundle, write_manifest
from serving.verdict.calibration_file import CalibrationPair
from tests.helpers import make_folder
from tests.test_bulk import read
from tests.test_ood import calibration, draw


def test_histograms_show_any_name(tmp_path, monkeypatch):
    """A dollar sign begins no formula, and an underscore hides nothing."""
    figures = []
    written = FigureCanvasAgg.print_figure
    monkeypatch.setattr(
        FigureCanvasAgg,
        "print_figure",
        lambda canvas, *args, **how: (figures.append(canvas.figure), written(canvas, *args, **how)),
    )
    scores = {name: np.arange(50.0) for name in (COMBINED, RAW_BPD)}
    _histogram(scores, scores, "price_$5_and_$6", "_hidden", tmp_path / "histogram.png")
    assert (tmp_path / "histogram.png").stat().st_size > 500
    for axes in figures[0].axes:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            "ID: price_$5_and_$6",
            "OOD: _hidden",
        ]


def test_a_bundle_that_cannot_score_is_reported_as_such(tiny_bundle, tmp_path, capsys):
    """Not as one that ade calibrate could calibrate."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    write_manifest(bundle, {**open_bundle(bundle).manifest, "operations": ["sample"]})
    images = tmp_path / "images.npy"
    np.save(images, np.zeros((3, 8, 8, 3), np.uint8))
    words = ["ood-bench", str(bundle), "--id", str(images), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "cannot score: it was trained without an inference" in capsys.readouterr().err


def test_names_of_files_do_not_control_the_terminal(tiny_bundle, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a\x1b[2J\u202eb.png").write_bytes(b"broken")
    (images / "c\x1b[2J").symlink_to(tmp_path)
    words = ["ood-bench", str(tiny_bundle), "--id", str(images), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(r"\x1b[2J" in line for line in lines) == 3
    assert all(line.isprintable() for line in lines)


def test_a_spreadsheet_runs_no_name_of_a_folder(tmp_path):
    _write_csv({"=1+1": {"combined": Figures(0.5, -0.1, 0.5, 0.5)}}, tmp_path / "figures.csv")
    (row,) = read(tmp_path / "figures.csv")
    assert row["ood_set"] == "'=1+1" and row["standard_error"] == "-0.1"


def test_the_bench_tells_what_the_features_add(pretrained_engine, real_images, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)
    both = pretrained_engine.calibrations
    its, other = (
        Measured(
            statistics_of(pretrained_engine, images, "corners", look_of=both.look_of),
            np.zeros(30, bool),
        )
        for images in (real_images[:30], noise)
    )
    report = write_report(both, "m", "corners", its, {"noise": other}, tmp_path)
    rows = [line for line in report.read_text().splitlines() if NO_FEATURES in line]
    assert rows[0].startswith(f"|  | {NO_FEATURES} | 1.0000 ± ") and "features.onnx" in rows[1]


def test_a_report_gives_no_shares_without_a_verdict(tmp_path):
    """50 calibration images cannot reject one image in 100: that is no rate of 0."""
    rng = np.random.default_rng(1)
    unusual = Measured({k: v + 9 for k, v in draw(rng, 40).items()}, np.zeros(40, bool))
    usual = Measured(draw(rng, 100), np.zeros(100, bool))
    judges = CalibrationPair(calibration(n=50))
    path = write_report(judges, "m", "ID", usual, {"unusual": unusual}, tmp_path)
    lines = path.read_text().splitlines()
    assert "| 0.01 | no verdict |  |" in lines
    assert "| 100.0 % | no verdict |" in next(line for line in lines if "unusual (40)" in line)
    assert any(line.startswith("| 0.1 | 0.") and " to 0." in line for line in lines)
    first = read(tmp_path / "figures.csv")[0]
    assert (first["flagged_0.05"], first["flagged_0.01"]) == ("1.0", "")
    assert "no verdict" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("is_known", [True, False])
def test_the_bench_tests_on_images_that_calibrated_nothing(
    is_known, tiny_bundle, small_images, tmp_path, monkeypatch
):
    """Nor trained, if the bundle says that the model saw the same folder."""
    monkeypatch.setattr("export.gate.split.MIN_IMAGES", 1)
    photos = tmp_path / "photos"
    for i, image in enumerate(small_images.copy()):
        image[0, 0, :2] = divmod(i, 256)  # no two are equal
        (photos / str(i % 7)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(photos / str(i % 7) / f"{i}.png")
    opened = open_bundle(tiny_bundle)
    if is_known:
        splits = {"train": "photos: 240 files by hash of the file name"}
        opened.manifest["data"] = {"name": "photos", "splits": splits}
    given = argparse.Namespace(data=str(photos), root=None)
    readers, name = calibrate_command._images(given, opened, None)
    fit, calibration, unseen, trained = map(set, readers)
    bench = argparse.Namespace(in_distribution=str(photos), images=None)
    _, tested, copies = ood_bench._id_images(bench, opened, name)
    assert set(copies) == trained and set(tested) == unseen
    _, tested, _ = ood_bench._id_images(bench, opened, "other")
    assert set(tested) == unseen if is_known else set(tested) > fit | calibration


def test_a_folder_is_benched_whatever_its_name(tiny_bundle, small_images, tmp_path):
    named = tmp_path / os.fsdecode(b"caf\xe9")  # folders' names need not be UTF-8
    make_folder(named, small_images[:, ::-1])
    noise = tmp_path / "noise.npy"
    np.save(noise, np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8))
    words = ["ood-bench", str(tiny_bundle), "--id", str(named), "--ood", str(noise)]
    words += ["--out", str(tmp_path / "bench"), "--images", "60", "--corrupted", "20"]
    assert main(words) == 0
    report = (tmp_path / "bench" / "report.md").read_text()
    assert "caf\\udce9" in report and "| noise (30) | combined |" in report
    assert (tmp_path / "bench" / "histogram-5.png").is_file()
    rows = read(tmp_path / "bench" / "figures.csv")
    assert any((row["ood_set"], row["score"]) == ("noise", "combined") for row in rows)


@pytest.mark.parametrize(
    "words, message",
    [
        (["OUT", "--id", "DATA", "--out", "DATA/run"], "--out must lie outside of"),
        (["OUT", "--id", "OUT", "--ood", "DATA", "--out", "DATA"], "--out must lie outside of"),
        (["OUT", "--id", "DATA", "--out", "OUT2"], "is not a bundle"),
        (["OUT", "--id", "DATA", "--root", "OUT2", "--out", "OUT2"], "--root goes with a named"),
    ],
)
def test_the_command_line_says_what_is_wrong(words, message, tmp_path, small_images, capsys):
    data = str(make_folder(tmp_path / "images", small_images[:40]))
    given = [w.replace("DATA", data).replace("OUT", str(tmp_path / "out")) for w in words]
    assert main(["ood-bench", *given]) == 2
    assert message in capsys.readouterr().err
