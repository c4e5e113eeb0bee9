"""Fitting: the plan, the survey of the folder, the report, and one complete run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import read_image
from ade_base.pictures.show import write_png
from ade_cli.main import main
from export.features import data_of
from export.gate.corruptions import CORRUPTIONS, SUBTLE
from export.gate.images import digests_of
from export.parity import ParityError
from fitting.encoder import ENCODER_ABOUT, fit_encoder
from fitting.findings import _caught, _scores, _tested
from fitting.held_out import held_out_images
from fitting.pipeline import _bundle, _keep_plan, _survey, _train, fit_folder
from fitting.plan import Plan, PlanError, make_plan, read_budget
from fitting.report import (
    ALPHAS,
    Caught,
    EncoderFindings,
    Findings,
    Outlier,
    false_alarms,
    weaknesses,
    write_report,
)
from fitting.survey import Survey, as_dict, choose_image_size, picture_sizes, survey
from serving.engine.bundle import Bundle, open_bundle, verify_bundle
from serving.engine.engine import InferenceEngine
from serving.engine.noise import short_digest
from serving.ingest.picture import Picture
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.false_alarms import false_alarm_band
from tests.helpers import PRETRAINED, ROOT, make_folder, narrow
from training.data import REPEATS, DataError, Dataset, ImageSet
from training.datasets.folder import image_files, load_files, load_folder
from training.flagship import JOINT_COST, MODEL
from training.labels import class_folders, class_labels, why_no_classes
from training.run_options import RunOptions
from training.runs import write_json
from training.step import Trainer, TrainingDiverged


@pytest.mark.parametrize(
    "text, minutes", [("20m", 20), ("1.5h", 90), ("2d", 2880), ("45", 45), (" 5m ", 5)]
)
def test_budgets(text, minutes):
    assert read_budget(text) == minutes


@pytest.mark.parametrize("text", ["", "x", "-5m", "0", "10s", "1h30m", "nan"])
def test_invalid_budgets(text):
    with pytest.raises(PlanError, match="a budget must be a time such as 20m"):
        read_budget(text)


def test_plans_fit_their_budget():
    for budget, on_gpu, name, size in (
        (1.2, False, "v-ade", "tiny"),
        (19, False, "v-ade", "tiny"),
        (20, False, "flagship", "tiny"),
        (120, False, "flagship", "tiny"),
        (2, True, "flagship", "small"),
        (600, False, "flagship", "small"),
        (1440, False, "flagship", "small"),
    ):
        plan = make_plan("/images", "images", 32, budget, on_gpu)
        licensed = make_plan("/images", "images", 32, budget, on_gpu, "CC0-1.0")
        assert Plan.from_dict(licensed.to_dict()).licence == "CC0-1.0" and licensed == plan
        assert plan.licence is None
        assert (plan.recipe, plan.size) == (name, size)
        config = plan.config()
        assert config.first_batch_size == (16 if size == "tiny" else 32)
        assert config.reconstruction_weight and config.free_bits and config.optimizer == "muon"
        assert all(getattr(config.model, key) == value for key, value in MODEL[size].items())
        if name == "flagship":
            # Steps of the likelihood alone are faster, by about JOINT_COST.
            share = config.likelihood_share
            minutes = plan.minutes * share / (share + JOINT_COST * (1 - share))
            least = 0.35 * plan.minutes
            assert minutes == pytest.approx(least if on_gpu else max(11, least), rel=0.01)
        else:
            assert config.discriminator is None
        assert 0 < plan.minutes <= budget - 0.5
        assert plan.rest <= 60.1  # a day leaves no more for the other steps than six hours
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(PlanError, match="too small"):
        make_plan("/images", "images", 32, 0.4, False)


def test_a_fitting_resumes_with_the_plan_it_was_begun_with():
    """The error names the difference: a choice of the user, or the version of the plan."""
    plan = make_plan("/images", "images", 32, 60, False)
    make_plan("/images", "images", 32, 60, False, "CC0-1.0").check_resumes(plan)
    with pytest.raises(PlanError) as raised:
        make_plan("/images", "images", 48, 20, False).check_resumes(plan)
    assert str(raised.value) == (
        "the fitting was begun with a budget of 60 minutes, images of 32 pixels; "
        "it cannot be resumed with a budget of 20 minutes, images of 48 pixels; "
        "use the same budget and image size"
    )
    old = dataclasses.replace(plan, recipe="av-ade", changes={"flow_width": 32})
    with pytest.raises(PlanError) as raised:
        plan.check_resumes(old)
    assert str(raised.value) == (
        "the fitting was begun by another version of this program, which trains av-ade at size "
        "tiny (flow_width 32) for 48 min; this version would train flagship at size tiny "
        "(likelihood_share 0.618) for 48 min: finish it with the version that began it"
    )


def test_an_old_fitting_is_refused_with_the_reason(tmp_path):
    plan = make_plan("/images", "images", 16, 60, False)
    old = {**plan.to_dict(), "recipe": "av-ade"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "plan.json").write_text(json.dumps(old))
    with pytest.raises(PlanError, match="another version .*, or choose another output folder"):
        fit_folder(plan, [], Counter(), tmp_path, lambda line: None)
    for damaged in ("", "{}", "[1]", json.dumps({**plan.to_dict(), "colour": "red"})):
        (tmp_path / "plan.json").write_text(damaged)
        with pytest.raises(PlanError, match="plan.json is damaged, or of another version"):
            fit_folder(plan, [], Counter(), tmp_path, lambda line: None)
        assert main(["fit", str(tmp_path), "--out", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    "theirs", ["exported", "bundle", "report.html", "survey.json", "plan.json", "run"]
)
def test_results_of_other_programs_are_not_taken_over(theirs, tmp_path):
    plan = make_plan("/images", "images", 16, 60, False)
    (tmp_path / theirs).mkdir()
    with pytest.raises(PlanError, match=f"{tmp_path} holds {theirs}, but no fitting"):
        fit_folder(plan, [], Counter(), tmp_path, lambda line: None)
    (tmp_path / theirs).rmdir()
    _keep_plan(plan, tmp_path)
    (tmp_path / "survey.json").touch()
    _keep_plan(plan, tmp_path)  # of a fitting that has trained nothing


def test_an_exported_fitting_keeps_its_licence(tmp_path):
    plan = make_plan("/images", "images", 16, 60, False, "CC0-1.0")
    _keep_plan(plan, tmp_path)
    for folder in ("run", "exported"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run" / "run.json").touch()
    (tmp_path / "exported" / "manifest.json").write_text('{"licence": "CC0-1.0"}')
    for licence in ("CC0-1.0", None):
        _keep_plan(dataclasses.replace(plan, licence=licence), tmp_path)
    with pytest.raises(PlanError, match=r"exported has the licence CC0-1\.0 and cannot take MIT"):
        _keep_plan(dataclasses.replace(plan, licence="MIT"), tmp_path)
    assert Plan.load(tmp_path / "plan.json").licence == "CC0-1.0"


@pytest.mark.parametrize(
    "sizes, side",
    [
        ({(32, 32): 9}, 32),
        ({(640, 480): 5, (20, 20): 1}, 64),
        ({(50, 70): 5}, 48),
        ({(9, 9): 3}, 16),
        ({None: 4}, 16),
        ({(28, 28): 6, None: 2}, 24),
    ],
)
def test_the_size_suits_most_images(sizes, side):
    assert choose_image_size(Counter(sizes)) == side


def test_the_survey_of_a_folder(tmp_path, small_images):
    folder = make_folder(tmp_path / "images", small_images)
    for i in range(60):
        shutil.copy(folder / "class0" / "0000.png", folder / f"copy{i}.png")
    for i in range(12):
        shutil.copy(folder / "class1" / "0001.png", folder / f"again{i}.png")
    files = image_files(folder)
    dataset = load_files(folder, files, 8, None, lambda line: None)
    names = dataset.files
    assert {part: len(rows) for part, rows in names.items()} == {
        part: len(s) for part, s in dataset.parts.items()
    }
    for part, rows in names.items():
        for row in (0, len(rows) - 1):
            pixels = np.asarray(Image.open(folder / rows[row]))
            if pixels.shape == (8, 8, 3):
                assert np.array_equal(pixels, dataset.parts[part].images[row])
    sizes = picture_sizes(files)
    found = survey(sizes, dataset)
    assert found.files == 375 and found.sizes == {"8 x 8": 372, "unreadable": 2, "40 x 20": 1}
    assert len(found.broken) == 2 and "broken.png" in found.broken
    often, seldom = sorted(found.twice, key=len, reverse=True)
    assert (len(often), len(seldom)) == (61, 13) and "class0/0000.png" in often
    held_out = {name for part in ("select", "calibrate", "test") for name in names[part]}
    assert len(held_out & set(often)) >= REPEATS  # so it will repeat in use
    assert found.leaking and set(found.leaking) == held_out & set(seldom)
    kept = {part: len({*rows} - {*found.leaking}) for part, rows in names.items()}
    assert found.parts == kept
    assert found.fitted == kept["select"] - len({*often} & {*names["select"]})
    # The same pictures under other names are in other parts.
    shutil.move(folder / "again0.png", folder / "another name.png")
    renamed = load_files(folder, image_files(folder), 8, None, lambda line: None)
    again = survey(sizes, dataset)
    before = json.loads(json.dumps(as_dict(found)))
    assert not again.change_since(before)
    del before["fitted"]  # of an earlier version
    assert not again.change_since(before)
    moved = dataclasses.replace(survey(sizes, renamed), twice=found.twice)
    assert moved.change_since(as_dict(found)) == "names or pixels differ"
    unread = dataclasses.replace(again, broken={**again.broken, "a.png": "Input/output error"})
    could = "files that could be used then: a.png: Input/output error"
    assert unread.change_since(as_dict(found)) == could
    fewer = dataclasses.replace(again, files=374)
    assert fewer.change_since(as_dict(found)) == "375 files then, 374 now"
    assert [line.split(":")[0] for line in found.warnings[1:]] == [
        "Held-out files that are copies of training images, left out of calibration and tests",
        "Files that cannot be used",
        "Images that are not 8 x 8, whose centre squares were resized",
    ]


def test_pictures_that_calibration_leaves_out_count_for_too_few(tmp_path, small_images):
    """Before the training, which would be in vain."""
    rows = {
        "train": [0, 1],
        "select": [*range(1, 22), *[2] * 5],  # 1 is trained on, 2 repeats, 3 calibrates
        "calibrate": [3, *range(30, 60)],
        "test": [4, 5],
    }

    def surveyed():
        parts = {part: ImageSet(small_images[its]) for part, its in rows.items()}
        names = {part: [f"{part}{i}.png" for i, _ in enumerate(its)] for part, its in rows.items()}
        dataset = Dataset("images", parts, {}, files=names)
        return _survey(tmp_path, [], Counter(), dataset, tmp_path)

    with pytest.raises(DataError, match="select gets 19 images and needs at least 20, not count"):
        surveyed()
    rows["select"] += [1] * (REPEATS - 1)  # now 1 will repeat in use, and is fitted to once
    found = surveyed()
    assert (found.parts["select"], found.fitted) == (len(rows["select"]), 20)


def test_a_file_that_could_not_be_read_at_the_start_stays_left_out(
    tmp_path, small_images, monkeypatch
):
    """With other parts, the training could not be resumed."""
    folder = make_folder(tmp_path / "images", small_images)
    files = image_files(folder)
    plan = make_plan(str(folder), "images", 8, 20, False, None, len(files))
    late, trained_on = (folder / "class1" / "0001.png").read_bytes(), []

    def busy(content):
        if content == late:
            raise ImageError("too_large", "the image was not decoded in time", is_transient=True)
        return read_image(content)

    def fit_encoder(plan, found, dataset, out, step):
        trained_on.append((dataset.files, dataset.skipped))
        (out / ENCODER_ABOUT).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("training.datasets.files.RETRY_S", 0.0)
    monkeypatch.setattr("fitting.pipeline.MIN_IMAGES", {})
    monkeypatch.setattr("fitting.pipeline.fit_encoder", fit_encoder)
    for read, sizes in ((busy, Counter({None: len(files)})), (read_image, picture_sizes(files))):
        monkeypatch.setattr("training.datasets.files.read_image", read)
        with pytest.raises(KeyboardInterrupt):
            fit_folder(plan, files, sizes, tmp_path / "fit", lambda line: None)
    assert trained_on[0] == trained_on[1] and "class1/0001.png" in trained_on[1][1]


def test_rows_are_named_by_their_own_files(tmp_path, small_images):
    """Whatever the files are called: here each good name is the beginning of a broken file's."""
    for i, image in enumerate(small_images[:120]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.png: copy.png").write_bytes(b"broken")
    dataset = load_folder(tmp_path, 8, tmp_path / "cache", lambda line: None)
    again = load_folder(tmp_path, 8, tmp_path / "cache", lambda line: None)
    assert len(dataset.skipped) == 120 and sum(map(len, dataset.files.values())) == 120
    assert again.files == dataset.files
    for part, names in dataset.files.items():
        for row, name in enumerate(names):
            assert np.array_equal(
                dataset.parts[part].images[row], small_images[int(name.removesuffix(".png"))]
            )


def test_files_are_read_by_those_who_decode_them(tmp_path):
    """This keeps memory independent of the number of large files."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8)).save(
        tmp_path / "0.png", compress_level=0
    )
    for i in range(1, 40):  # 173 MB in all
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    script = (
        "import os, sys\nfrom training.datasets import load_dataset\n"
        "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])\n"  # a thread per core
        # In MiB; what getrusage reports begins with the peak of the process that starts this one.
        "status = lambda: open('/proc/self/status').read()\n"
        "peak = lambda: int(status().split('VmHWM:')[1].split()[0]) // 1024\n"
        "before = peak()\nload_dataset(sys.argv[1], None, 8)\nprint(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and int(done.stdout) < 90, done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["NOWHERE"], "is not a folder"),
        (["FEW", "--budget", "soon"], "a budget must be a time"),
        (
            ["FEW", "--budget", "5m"],
            [
                "of 64 files (unusable: 2, such as broken.png: ",
                "the part select gets 1",
                "links to folders are not followed: FEW/linked\n",
                "to PNG or JPEG first: 2 .dng, 1 .jxl\n",
                "no classes: copy.png lies outside the 3 folders\n",
            ],
        ),
        (["FEW", "--name", "a b"], "a model's name must start with a letter or digit"),
        (
            ["HUGE", "--budget", "5m"],
            "no image is left to train on: 9 of 9 files are unusable, such as 0.png: an image may "
            "have at most 16000000 pixels",
        ),
        (["FEW", "--budget", "1m"], "this budget leaves 0.5 and will be exceeded"),
        (["cifar10"], "holds no images"),  # a folder may be called like a data set
        (["FEW", "--image-size", "20"], "--image-size must be a multiple of 8"),
        (["FEW", "--image-size", "128"], "--image-size must be at most 64 pixels, got 128"),
        (["FEW", "--image-size", "0"], "--image-size must be an integer of at least 2, got 0"),
        (["TMP"], "--out must lie outside"),
    ],
)
def test_folders_that_cannot_be_fitted(
    arguments, message, tmp_path, small_images, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "few", small_images[:60])
    shutil.copy(tmp_path / "few" / "class0" / "0000.png", tmp_path / "few" / "copy.png")
    (tmp_path / "few" / "linked").symlink_to(tmp_path / "few" / "class0")
    for name in ("class0/a.DNG", "class1/b.dng", "c.jxl"):
        (tmp_path / "few" / name).write_bytes(b"")
    for name in ("huge", "cifar10"):
        (tmp_path / name).mkdir()
    if "HUGE" in arguments:
        Image.new("L", (5000, 4000)).save(tmp_path / "huge" / "0.png")
        for number in range(1, 9):
            os.link(tmp_path / "huge" / "0.png", tmp_path / "huge" / f"{number}.png")
    places = {name.upper(): tmp_path / name for name in ("nowhere", "few", "huge")}
    places["TMP"] = tmp_path
    given = [str(places.get(argument, argument)) for argument in arguments]
    assert main(["fit", *given, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.replace(str(tmp_path / "few"), "FEW")
    for one in [message] if isinstance(message, str) else message:
        assert one in said and "one name" not in said


def test_sizes_are_read_once_and_after_all_checks(tmp_path, small_images, monkeypatch, capsys):
    """It may take minutes."""
    folder, out = make_folder(tmp_path / "images", small_images[:10]), tmp_path / "out"
    files = image_files(folder)
    plan = make_plan(str(folder), "images", 8, 60, False, None, len(files))
    given: list[Any] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delattr("ade_cli.fit.picture_sizes")
    monkeypatch.setattr("ade_cli.fit.fit_folder", lambda *its: given.append(its))
    (tmp_path / "file").touch()
    (tmp_path / "used" / "exported").mkdir(parents=True)
    out.mkdir()
    _keep_plan(plan, out)
    (out / "run").mkdir()
    (out / "run" / "run.json").touch()
    sizes = picture_sizes(files)
    found = load_files(folder, files, 8, None, lambda line: None)
    write_json(out / "survey.json", as_dict(survey(sizes, found)))
    for words, message in (
        (["new", "--device", "cuda"], "PyTorch finds no CUDA device"),
        (["new", "--image-size", "20"], "--image-size must be a multiple of 8"),
        (["new", "--budget", "0.4m"], "it is too small"),
        (["file"], "--out must be a folder"),
        (["used"], "holds exported, but no fitting"),
        (["out", "--budget", "2h"], "begun with a budget of 60 minutes"),
    ):
        where = str(tmp_path / words[0])
        assert main(["fit", str(folder), "--out", where, *words[1:]]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(AttributeError):  # of the result
        main(["fit", str(folder), "--out", str(out)])
    assert given[0][0] == plan and given[0][2] == sizes


FOUND = Survey(
    *(300, {"8 x 8": 300}, {}, [], [], "a digest"),
    {"train": 1000, "select": 40, "calibrate": 80, "test": 40},
    *(40, []),
)


@pytest.fixture
def findings(tiny_bundle, small_images):
    """Of a gate without a weakness, except that few images calibrated it."""
    bundle, held_out = open_bundle(tiny_bundle), small_images[:40]
    calibrations = CalibrationPair.load(bundle.folder / "calibration.npz")
    alarms = false_alarms({False: list((np.arange(40) + 0.5) / 40), True: []}, calibrations)
    calibration = bundle.manifest["calibration"]
    changes = {
        "evaluation": {"test": {"figures": {"bpd": {"value": 3.0, "error": 0.1}}}},
        "training": {"images_seen": 1000, "started_from": {"images_seen": 2500}},
        "calibration": {
            **calibration,
            "images": 1000,
            "resized": {**calibration["resized"], "images": 1200},
        },
    }
    return Findings(
        make_plan("/images", "images", 8, 20, False),
        FOUND,
        Bundle(bundle.folder, {**bundle.manifest, **changes}),
        *(held_out, held_out, held_out, alarms, 0, [], 40),
        [Caught("flat", True, (1.0, 0.95, 0.5))],
        EncoderFindings(1000, 0, False),
    )


def with_manifest(findings, **changes):
    bundle = findings.bundle
    return dataclasses.replace(
        findings, bundle=Bundle(bundle.folder, {**bundle.manifest, **changes})
    )


@pytest.fixture
def page_of(tmp_path):
    def write(findings):
        write_report(findings, tmp_path / "report.html")
        return (tmp_path / "report.html").read_text()

    return write


def test_corrupted_images_are_caught_in_each_way(tiny_bundle, small_images):
    pictures = [Picture(image, []) for image in small_images[:40]]
    caught = _caught(InferenceEngine(tiny_bundle, device="cpu"), pictures)
    by_name = {one.corruption: one.rejected for one in caught}
    assert set(by_name) == {*CORRUPTIONS, *SUBTLE}
    assert by_name["uniform noise"][0] > 0.5 and all(a >= b >= c for a, b, c in by_name.values())


def test_the_report_starts_with_the_quality_of_the_gate(findings, page_of, tiny_bundle, tmp_path):
    """It names few epochs and corruptions that are accepted. Expected alarms are not praised."""
    caught = [Caught("nothing at all", True, (0.4, 0.3, 0.0)), *findings.caught]
    weak = dataclasses.replace(findings, bundle=open_bundle(tiny_bundle), caught=caught)
    said = " ".join(weaknesses(weak))
    assert "training images 0.0 times; 3 times, or 10,000 images" in said
    assert "calibrated" not in said
    assert "only 30\u00a0% of corrupted images are rejected: nothing at all" in said
    folder = tmp_path / "my fits"
    folder.symlink_to(tiny_bundle)
    manifest = {**weak.bundle.manifest, "evaluation": findings.bundle.manifest["evaluation"]}
    page = page_of(dataclasses.replace(weak, bundle=Bundle(folder, manifest)))
    headings = ("Do not rely on this gate yet", "nothing at all", "<h2>Use it")
    assert sorted(headings, key=page.index) == list(headings)
    assert f"<pre>ade serve &#39;{folder}&#39;\n" in page
    assert "1,000 more calibration images would narrow the band" in page
    assert "holds" not in page and "as expected" in page


def test_a_good_gate_is_reported_as_one(findings, page_of):
    assert weaknesses(findings) == []
    page = page_of(findings)
    assert "No weakness was found" in page and "The gate works on what it was tried on" in page
    assert f"<h1>Gate for {findings.plan.name}: report of ade fit</h1>" in page
    subtle = [*findings.caught, Caught("blurred a little", False, (0.3, 0.12, 0.0))]
    missed = page_of(dataclasses.replace(findings, caught=subtle))
    assert "rejects only a part of these: blurred a little (12\u00a0%)" in missed
    assert "but many subtle corruptions pass" in missed and "works on what it was" not in missed


@pytest.mark.parametrize("seen, is_enough", [(10_000, True), (9_000, False)])
def test_of_a_large_folder_enough_images_are_enough(findings, seen, is_enough):
    """Although each was seen less than three times."""
    large = dataclasses.replace(FOUND, parts={**FOUND.parts, "train": 50_000})
    trained = with_manifest(findings, training={"images_seen": seen})
    assert (weaknesses(dataclasses.replace(trained, survey=large)) == []) == is_enough


@pytest.mark.parametrize(
    "images, heading, sentence",
    [
        (
            500,
            "false-alarm rate is rough",
            "500 images (8 of 100 files) calibrated the verdict; 1,000 or more",
        ),
        (98, "Do not rely on this gate yet", "at the default alpha of 0.01, nothing can be"),
    ],
)
def test_few_calibration_images_are_a_weakness(findings, page_of, images, heading, sentence):
    """The command to paste has an alpha with verdicts."""
    calibration = {**findings.bundle.manifest["calibration"], "images": images}
    page = page_of(with_manifest(findings, calibration=calibration))
    assert heading in page and sentence in page
    assert ("--resize fit --alpha 0.02 --out" in page) == (images == 98)


@pytest.mark.parametrize(
    "encoder, words",
    [
        (None, " It sees the whole original of each picture, at 224 × 224 pixels, and each of its"),
        (EncoderFindings(1000, 0, False), "</p>"),
        (
            EncoderFindings(9000, 3, False, 0.714, 0.4),
            " From 9,000 training images it has learnt the\n3 folders as classes. "
            "It recognises the folder of 71.4\u00a0% of the test images;\n"
            "40\u00a0% of them are in the largest.</p>",
        ),
        (
            EncoderFindings(2000, 0, True),
            " It has not learnt your folders as classes, because it recognised "
            "them no better than\nguessing.</p>",
        ),
    ],
)
def test_the_report_says_what_the_encoder_is_worth(findings, page_of, encoder, words):
    from_imagenet = "EfficientNet-Lite0, which was trained on ImageNet's\nphotographs."
    assert from_imagenet + words in page_of(dataclasses.replace(findings, encoder=encoder))


def test_names_of_files_are_no_markup_in_the_report(findings, page_of):
    """Anybody may have chosen them."""
    hostile = '<script>alert("x")</script>.png'
    found = dataclasses.replace(FOUND, broken={hostile: "broken"}, twice=[[hostile, "b.png"]])
    outlier = Outlier(hostile, 0.01, 9.0, findings.held_out[0])
    page = page_of(dataclasses.replace(findings, outliers=[outlier], survey=found))
    assert "<script" not in page and page.count("&lt;script&gt;") == 4


def test_false_alarms_are_those_of_each_calibration():
    """Resized images have a calibration and a band of their own."""
    shipped = CalibrationPair.load(PRETRAINED / "calibration.npz").exact
    assert shipped is not None
    calibrations = CalibrationPair(
        dataclasses.replace(shipped, scores=np.arange(3000.0)),
        dataclasses.replace(shipped, scores=np.arange(150.0)),
    )
    exact, resized = [0.5] * 960 + [0.01] * 40, [0.5] * 20
    found = false_alarms({True: resized, False: exact}, calibrations)
    assert [(row.resized, row.tested, row.alpha) for row in found] == [
        (kind, count, alpha) for kind, count in ((False, 1000), (True, 20)) for alpha in ALPHAS
    ]
    level = 1 - 0.05 / 6
    for row in found:
        n = 150 if row.resized else 3000
        assert (row.low, row.high) == false_alarm_band(n, row.alpha, level, row.tested)
    assert [row.rejected for row in found] == [0.04, 0.04, 0.04, 0.0, 0.0, 0.0]
    assert [row.is_expected for row in found] == [False, True, False, True, True, True]
    # A picture that repeats at the threshold: none is rejected, and that is no weakness.
    dark = dataclasses.replace(shipped, scores=np.sort([*range(2850), *[5000.0] * 150]))
    found = false_alarms({False: [0.5] * 950 + [151 / 3001] * 50}, CalibrationPair(dark, dark))
    assert [row.rejected for row in found][1:] == [0, 0]
    assert all(row.is_expected for row in found[1:])


def test_a_file_that_cannot_be_read_now_is_not_judged_as_a_resized_one(
    tiny_bundle, small_images, tmp_path
):
    engine = InferenceEngine(open_bundle(tiny_bundle), device="cpu")
    files = {"test": ["0.png", "1.png"]}
    dataset = Dataset("d", {"test": ImageSet(small_images[:2])}, {}, files=files)
    (tmp_path / "1.png").write_bytes(write_png(small_images[1]))
    ((row, is_resized, _),) = _scores(engine, dataset, "test", [0, 1], tmp_path)
    assert (row, is_resized) == (1, False)


def test_held_out_images_are_no_copies_of_training_images(small_images):
    names = [f"{i}.png" for i in range(50)]
    dataset = Dataset("d", {"test": ImageSet(small_images[:50])}, {}, [], {"test": names})
    surveyed: Any = SimpleNamespace(leaking=["7.png"])
    assert len(held_out_images(dataset, surveyed, 10)) == 10
    found = {image.tobytes() for image in held_out_images(dataset, surveyed, 100)}
    assert found == {image.tobytes() for image in np.delete(small_images[:50], 7, 0)}


def test_copies_of_images_that_the_density_was_fitted_to_are_not_tested(small_images):
    """They look more usual than they are; a picture that repeats in use is tested, too."""
    shipped = CalibrationPair.load(PRETRAINED / "calibration.npz").exact
    assert shipped is not None
    digests = np.array([short_digest(image) for image in small_images[:2]], np.uint64)
    calibration = dataclasses.replace(shipped, fitted_digests=digests)
    rows = [5, 0, 6, *[1] * REPEATS, 7]
    dataset = Dataset("d", {"test": ImageSet(small_images[rows])}, {})
    known = digests_of(CalibrationPair(calibration, calibration))
    tested = _tested(dataset, range(len(rows)), known)
    assert [rows[row] for row in tested] == [5, 6, 1, 7]


def test_an_image_without_a_finite_score_is_neither_caught_nor_missed(tiny_bundle, small_images):
    engine = InferenceEngine(open_bundle(tiny_bundle), device="cpu")

    def score(images, **options):
        return [None] * 10 + engine.score(images, **options)[10:]

    some: Any = SimpleNamespace(score=score, calibrations=engine.calibrations)
    pictures = [Picture(its, []) for its in small_images[:20]]
    by_name = {its.corruption: its.rejected for its in _caught(some, pictures)}
    assert by_name["uniform noise"][0] == 1
    some.score = lambda images, **options: [None] * len(images)
    assert _caught(some, pictures)[0].rejected == (None, None, None)


@pytest.mark.parametrize(
    "paths, expected",
    [
        (["cat/1", "dog/1"], ["cat", "dog"]),
        (["train/cat/1", "val/cat/1", "train/dog/1", "val/dog/1"], ["cat", "dog"]),
        (["images/cat/1", "images/dog/1"], ["cat", "dog"]),
        (["a/Train/b/cat/x/1", "a/test/b/dog/1"], ["cat", "dog"]),
        (["train/1", "car/1"], ["car", "train"]),
        (["train/1", "val/1"], None),
        (["images/1"], None),
        (["images/cat/1", "1"], None),
        ([], None),
    ],
)
def test_folders_above_the_classes_are_no_classes(paths, expected):
    names = [f"{path}{i}.png" for path in paths for i in range(20)]
    assert class_folders(names) == expected
    reason = why_no_classes(names)
    assert reason is None or expected is None
    if expected:
        images = ImageSet(np.zeros((len(names), 8, 8, 3), np.uint8))
        dataset = Dataset("d", {"train": images}, {}, [], {"train": names, "test": ["cat/1.png"]})
        classes = class_labels(dataset)
        assert classes is not None and set(classes) == {0, 1}


def test_why_folders_are_no_classes():
    names = [f"{folder}/{i}.png" for folder in "ab" for i in range(30)]
    assert why_no_classes(names) is why_no_classes(names[:30]) is why_no_classes(["a.png"]) is None
    assert why_no_classes([*names, "logo.png"]) == "logo.png lies outside the 2 folders"
    assert why_no_classes([*names, "caf\udce9.png"]) == "caf\\udce9.png lies outside the 2 folders"
    assert why_no_classes(names[25:35]) == (
        "the 2 folders have 5 training images on average, and 20 are needed"
    )


def test_names_that_all_folders_repeat_are_reported(tmp_path, small_images):
    """Files of one name are in one part: calibration would see few views of each thing."""
    for i, image in enumerate(small_images[:200]):
        target = tmp_path / f"thing{i // 40}" / f"{i % 40}.png"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(target)
    files = image_files(tmp_path)
    found = survey(picture_sizes(files), load_files(tmp_path, files, 8, None, lambda line: None))
    (said,) = (line for line in found.warnings if "of the part calibrate" in line)
    assert "different names" in said and "put the folder's name into it" in said


def class_folders_of(folder, images, is_second):
    for i, (image, second) in enumerate(zip(images, is_second, strict=True)):
        target = folder / ("dark" if second else "bright")
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target / f"{i:04d}.png")
    return folder


SMALL_FLOW = {"flow_scales": 1, "flow_couplings": 2, "flow_width": 8}


@pytest.fixture
def quick_fit(monkeypatch):
    """Train and export a small flow, and score few images for the report."""
    monkeypatch.setitem(MODEL, "tiny", SMALL_FLOW)
    monkeypatch.setattr("fitting.findings.SCANNED_IMAGES", 50)
    monkeypatch.setattr("fitting.findings.CORRUPTED_IMAGES", 20)


@pytest.fixture
def cpu_time(monkeypatch):
    """Train encoders for minutes of CPU time: they learn on a busy machine, too."""
    clock = SimpleNamespace(monotonic=time.process_time)
    for module in ("small_encoder", "distillation"):
        monkeypatch.setattr(f"training.{module}.time", clock)


@pytest.mark.parametrize("fails", [None, "late", "early"])
def test_a_run_that_diverges_falls_back_on_the_likelihood(
    fails, monkeypatch, tmp_path, small_images
):
    """On the checkpoint from before the adversary took part, if it got there."""
    plan = make_plan("/images", "images", 8, 60, False)
    config = dataclasses.replace(
        narrow("av-ade"), likelihood_share=0.5, warmup_steps=1, batch_size=16
    )
    monkeypatch.setattr(Plan, "config", lambda self: config)
    seeds: set[int] = set()
    run_steps = Trainer.run

    def run(self, *given):
        seeds.add(self.seed)
        if fails and self.step == {"early": 1, "late": 3}[fails]:
            raise TrainingDiverged("the loss is not finite")
        return run_steps(self, *given)

    def options(**given):
        return RunOptions(**{**given, "images": 16 * 4, "minutes": None})

    monkeypatch.setattr(Trainer, "run", run)
    monkeypatch.setattr("fitting.pipeline.RunOptions", options)
    make_folder(tmp_path / "images", small_images[:60])
    dataset = load_folder(tmp_path / "images", 8, None, lambda line: None)
    lines: list[str] = []
    if fails == "early":
        for out in (tmp_path, tmp_path / "other"):
            advice = f"not finite; give an output folder of another name than {out} to try again"
            with pytest.raises(TrainingDiverged, match=advice):
                _train(plan, dataset, out, lines.append)
        assert len(seeds) == 2, "the advice helps"
        return
    for _ in range(2):  # the second time nothing is left to do
        checkpoints = _train(plan, dataset, tmp_path, lines.append)
        names = ["step-000000004", "step-000000002"][fails == "late" :]
        assert [path.name for path in checkpoints] == names
    assert sum("training" in line for line in lines) == 1
    assert any("before the adversary is used" in line for line in lines) == (fails is not None)


@pytest.mark.parametrize("unfit", [1, 2])
def test_a_model_that_cannot_be_exported_is_given_up_for_the_one_before_the_adversary(
    unfit, monkeypatch, tmp_path
):
    runs = [tmp_path / "step-4", tmp_path / "step-2"]
    tried: list[Path] = []

    def export(plan, found, dataset, run, exported, step):
        tried.append(run)
        if len(tried) <= unfit:
            raise ParityError("an output differs")
        exported.mkdir()

    monkeypatch.setattr("fitting.pipeline._export", export)
    (tmp_path / "bundle").mkdir()  # is not made again
    given: Any = (None, None, None, runs, None, tmp_path, lambda line: None)
    if unfit == 2:
        with pytest.raises(ParityError):
            _bundle(*given)
    else:
        assert _bundle(*given) == tmp_path / "bundle"
    assert tried == runs


def test_what_a_killed_export_or_calibration_left_is_removed(tmp_path):
    for name in ("exported", "bundle", ".exported.0a.tmp", ".bundle.0b.tmp"):
        (tmp_path / name).mkdir()
    given: Any = (None, None, None, [], None, tmp_path, lambda line: None)
    _bundle(*given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "exported"]


@pytest.mark.usefixtures("mean_colours")
@pytest.mark.parametrize("learnable", [True, False, None], ids=["classes", "noise", "none"])
def test_an_encoder_uses_classes_that_it_recognises(learnable, small_images, monkeypatch, tmp_path):
    """It is made once. Held-out images are recognised in parts: all would need tens of GiB."""
    monkeypatch.setattr("fitting.encoder.AT_A_TIME", 7)
    rng = np.random.default_rng(0)
    images = np.concatenate([small_images, small_images[:, ::-1]])
    is_dark = rng.random(600) < 0.5
    images[is_dark] //= 3
    if learnable is None:
        folder = make_folder(tmp_path / "images", images[:50])
    else:
        classes = is_dark if learnable else rng.permutation(is_dark)
        folder = class_folders_of(tmp_path / "images", images, classes)
    files = image_files(folder)
    dataset = load_files(folder, files, 8, None, lambda line: None)
    found = survey(picture_sizes(files), dataset)
    has_classes = learnable is not None
    plan = make_plan(str(folder), "images", 8, 20, False, None, len(files), has_classes)
    lines: list[str] = []
    source = fit_encoder(plan, found, dataset, tmp_path, lines.append)
    making = "making an encoder" + " for 2 classes: bright, dark" * has_classes
    guesses = "the encoder recognises the classes no better than guessing: it does without them"
    assert lines == [making, *([guesses] if learnable is False else [])]
    outputs = [output.name for output in onnx.load(source.path).graph.output]
    assert outputs == ["features", "logits"][: 1 + bool(learnable)]
    assert (data_of(source.path) is not None) == bool(learnable), "what it was trained on"
    lines.clear()
    assert fit_encoder(plan, found, dataset, tmp_path, lines.append) == source and not lines


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_time", "quick_fit")
@pytest.mark.parametrize("scale", [1, 3])
def test_a_gate_with_an_encoder(scale, tmp_path, small_images):
    """The calibration uses it, and the report says what it is worth.

    Of pictures of the model's size it learns the classes; of larger ones it sees the originals.
    """
    images = np.concatenate([small_images, small_images[:, :, ::-1], 255 - small_images[:200]])
    is_dark = np.arange(len(images)) % 2 == 0
    images[is_dark] //= 3
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    folder = class_folders_of(tmp_path / "images", images, is_dark)
    files = image_files(folder)
    plan = make_plan(str(folder), "images", 8, 20, False, None, len(files), True)
    plan = dataclasses.replace(plan, budget=1.2, minutes=0.2)
    lines: list[str] = []
    fitted = fit_folder(plan, files, picture_sizes(files), tmp_path / "fit", lines.append)
    bundle = verify_bundle(fitted.bundle)
    assert (bundle.has("features.onnx"), bundle.has("encoder.onnx")) == (scale == 1, scale > 1)
    assert bundle.manifest["calibration"]["statistic"].endswith("2 semantic ones")
    assert bundle.manifest["calibration"]["images"] < 0.12 * len(files)  # those held out alone
    page = fitted.report.read_text()
    if scale == 1:
        assert bundle.manifest["features"]["classes"] == 2
        assert "it has learnt the\n2 folders as classes. It recognises the folder of" in page
    else:
        assert "It sees the whole original of each picture" in page
    lines.clear()
    fit_folder(plan, files, picture_sizes(files), tmp_path / "fit", lines.append)
    assert not any("training" in line for line in lines)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_fit")
def test_a_folder_becomes_a_gate_and_resumes_after_a_kill(tmp_path, real_images, capsys):
    both = np.concatenate([real_images, real_images[:, :, ::-1], 255 - real_images[:100]])
    # 24 pixels: a size that is no power of two.
    folder = make_folder(tmp_path / "My images", both[:, 4:28, 4:28])
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"broken too")
    out = tmp_path / "fit"
    words = ["fit", str(folder), "--out", str(out), "--budget", "0.8m", "--image-size", "24"]
    script = (
        f"import sys; from training.flagship import MODEL; MODEL['tiny'] = {SMALL_FLOW}; "
        "from ade_cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "training v-ade" in line:
            break
    process.kill()
    process.communicate()
    assert main(words) == 0
    said = capsys.readouterr()
    assert "704 image files" in said.err
    assert f"serve it: ade serve {out / 'bundle'}" in said.out
    bundle = verify_bundle(out / "bundle")
    assert bundle.name == "my-images" and bundle.image_shape == (24, 24, 3)
    calibration = bundle.manifest["calibration"]
    assert calibration["images"] > 40 and calibration["resized"]["resized_and_back"] > 60
    assert bundle.manifest["evaluation"]["test"]["figures"]["bpd"]["value"] < 20
    noise = np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), np.uint8)
    scores = InferenceEngine(bundle, device="cpu").score(noise)
    assert np.mean([score.verdict.p_value for score in scores]) < 0.1
    page = (out / "report.html").read_text()
    for text in (
        "Do not rely on this gate yet",
        "JPEG, quality 10",
        "False alarms",
        "broken.png",
        "caf\\udce9.png",
        "The most unusual",
        "data:image/png;base64,",
        "bits per dimension",
    ):
        assert text in page
    named = page.replace("http-equiv", "").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http" not in named  # nothing is fetched
    assert main(words) == 0 and "training" not in capsys.readouterr().err
    assert main([*words, "--image-size", "8"]) == 2
    assert "begun with images of 24 pixels" in capsys.readouterr().err
    Image.new("RGB", (24, 24)).save(folder / "another.png")
    assert main(words) == 2
    text = capsys.readouterr().err
    assert re.search("begun with 704 image files.*; .* with 705 image files", text)
