"""Several calibrations in one bundle: how they are made, and which decides."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_LZMA, ZipFile

import numpy as np
import pytest
from PIL import Image

import serving.verdict.calibration_file as file_module
from ade_base.pictures.show import write_png
from ade_cli import calibrate as calibrate_command
from ade_cli.main import main
from export.gate.calibrate import _parts, calibrate_bundle
from export.gate.corruptions import corrupted
from export.gate.images import digests_of
from export.gate.split import choose_files, choose_rows
from serving.api.service import Service
from serving.bulk import BulkError, BulkOptions, FileScorer, Versions
from serving.engine.bundle import CALIBRATION_NAME, open_bundle, verify_bundle, write_manifest
from serving.engine.engine import InferenceEngine
from serving.engine.noise import image_digest, short_digest
from serving.gate import Gate
from serving.ingest.requests import RawRequest
from serving.verdict.calibration import CalibrationError
from serving.verdict.calibration_file import CalibrationPair, UnknownCalibration, check_name
from training.data import PARTS, REPEATS, DataError, Dataset, ImageSet
from training.datasets.files import part_of


@pytest.fixture(scope="module")
def dark(small_images):
    """Images of a camera at night."""
    return small_images // 8


@pytest.fixture(scope="module")
def bundle(tiny_bundle, dark, tmp_path_factory):
    """With a calibration for that camera beside its own. Nothing changes it."""
    out = tmp_path_factory.mktemp("night") / "bundle"
    made = calibrate_bundle(tiny_bundle, out, dark[:150], dark[150:], "dark", calibration="night")
    assert made.name == "night" and len(made.version) == 12
    return out


def test_each_calibration_judges_its_own_images(bundle, dark):
    gate = Gate(bundle, alpha=0.05)
    by_own, by_night = gate.check(dark[:100]), gate.check(dark[:100], "night")
    assert np.mean([d.accepted for d in by_own]) < 0.5 < np.mean([d.accepted for d in by_night])
    assert by_night[0].calibration == {
        "name": "night",
        "version": CalibrationPair.load(bundle / "calibration-night.npz").version,
    }
    assert by_own[0].calibration is not None and by_own[0].calibration["name"] == "default"
    # Judged together, each image gets the verdict of its own calibration.
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    judges = [engine.calibrations_of(name) for name in ("default", "night") * 5]
    together = engine.score(dark[:10], calibrations=judges)
    assert [score.verdict.p_value for score in together] == [  # type: ignore[union-attr]
        (by_night if i % 2 else by_own)[i].p_value for i in range(10)
    ]
    with pytest.raises(UnknownCalibration, match="'day'; there are default, night"):
        gate.check(dark[:1], "day")


def test_requests_that_are_computed_together_are_judged_apart(bundle, dark):
    """An unknown name is an error of its own request only; the error lists the names."""
    service = Service("score", InferenceEngine(bundle, device="cpu", operations=["score"]))
    images = [base64.b64encode(write_png(image)).decode() for image in dark[:3]]

    def request(**parameters):
        return RawRequest("application/json", {"images": images, "alpha": 0.05, **parameters})

    names = ("night", "day", 5, None)  # null as of a tenant who was looked up and not found
    asked = [{}, *({"calibration": name} for name in names)]
    answers = service.answer([request(**parameters) for parameters in asked])
    bodies = [json.loads(answer.body) for answer in answers]
    assert [answer.status for answer in answers] == [200, 200, 422, 422, 422]
    assert bodies[4]["error"]["code"] == "bad_parameter"
    for body, name in ((bodies[0], "default"), (bodies[1], "night")):
        expected = Gate(bundle, 0.05).check(dark[:3], name)
        assert [r["p_value"] for r in body["results"]] == [d.p_value for d in expected]
        assert [r["calibration"] for r in body["results"]] == [expected[0].calibration] * 3
    assert bodies[2]["error"]["code"] == "unknown_calibration"
    assert bodies[2]["error"]["message"] == (
        "there is no calibration 'day'; there are default, night"
    )
    assert bodies[3]["error"]["message"] == "calibration must be a string, got 5"
    (long,) = service.answer([request(calibration="x" * 10_000)])
    assert long.status == 422 and len(long.body) < 300
    # Of the request, not of an image: one that cannot be read does not hide it.
    damaged = [base64.b64encode(b"junk").decode(), *images]
    alone = service.answer([request(calibration="day", images=damaged)])
    assert [answer.status for answer in alone] == [422] and not service.is_exhausted
    assert json.loads(alone[0].body) == bodies[2] and "index" not in bodies[2]["error"]
    (unread,) = service.answer([request(calibration="day", images=damaged[:1])])
    assert json.loads(unread.body) == bodies[2]
    counted = {
        m.labels: m.value for m in service.telemetry.collect() if "expected" in m.metric.name
    }
    assert set(counted) == {("default",), ("night",)}


def test_names():
    for name in ("camera-3", "a", "Tenant_1.eu", "x" * 64):
        check_name(name)
    for name in ("", "../x", ".hidden", "a/b", "x" * 65, "ä", "a b"):
        with pytest.raises(CalibrationError, match="must have at most 64"):
            check_name(name)


def test_the_command_adds_a_calibration(bundle, dark, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(dark[:60]):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
    data = ["--data", str(tmp_path / "photos")]
    out = tmp_path / "out"
    words = ["calibrate", str(bundle), str(out), *data]
    (tmp_path / "photos" / "a2.png").write_bytes(b"junk")
    assert main([*words, "--name", "camera-3"]) == 0
    said = capsys.readouterr().err
    assert f": left out 1 image: {tmp_path / 'photos' / 'a2.png'}: not an image" in said
    assert verify_bundle(out).calibrations == ["camera-3", "default", "night"]
    old, new = InferenceEngine(bundle), InferenceEngine(out)
    exact = new.calibrations_of("camera-3").exact
    assert exact is not None and len(exact.scores) == 31  # two fifths fit the density
    assert {**old.versions, "camera-3": new.versions["camera-3"]} == new.versions
    assert open_bundle(out).digest != open_bundle(bundle).digest
    about = open_bundle(out).manifest["calibrations"]
    assert {name: its["data"] for name, its in about.items()} == {
        "night": "dark",
        "camera-3": "photos",
    }
    assert main([*words[:2], str(tmp_path / "x"), *data, "--name", "../night"]) == 2
    assert "must have at most 64" in capsys.readouterr().err
    # Without a name, the bundle's own calibration is replaced, and the others are kept.
    shutil.rmtree(out)
    assert main(words) == 0
    versions = InferenceEngine(out).versions
    assert versions["night"] == old.versions["night"]
    assert versions["default"] != old.versions["default"]


@pytest.mark.parametrize("part, count", [("train", 1), ("test", 0)])
def test_a_folder_of_one_image_is_refused_with_the_number_that_is_needed(
    bundle, dark, tmp_path, capsys, part, count
):
    """Two fifths of one image are none, and the part test of a folder calibrates nothing."""
    photos = tmp_path / "photos"
    photos.mkdir()
    name = next(name for i in range(1000) if part_of(name := f"{i}.png") == part)
    Image.fromarray(dark[0]).save(photos / name)
    assert main(["calibrate", str(bundle), str(tmp_path / "out"), "--data", str(photos)]) == 2
    said = capsys.readouterr().err
    assert "at least 50 usable images are needed" in said and f", got {count}\n" in said
    (photos / name).write_bytes(b"junk")
    assert main(["calibrate", str(bundle), str(tmp_path / "out"), "--data", str(photos)]) == 2
    junk = f"calibration: its only image could not be used: {photos / name}: not an image"
    assert (junk in capsys.readouterr().err) == (part == "train")


def test_too_few_held_out_files_of_a_training_folder_are_refused_with_the_reason(bundle, tmp_path):
    """100 files suffice for a calibration, but not the 12 of 100 that trained nothing."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(100):
        (photos / f"{i}.png").touch()
    opened = open_bundle(bundle)
    splits = {"train": "photos: 80 files by hash of the file name"}
    opened.manifest["data"] = {"name": "photos", "splits": splits}
    few = [sum(part_of(f"{i}.png") == part for i in range(100)) for part in PARTS[1:3]]
    with pytest.raises(DataError) as raised:
        choose_files(photos, opened, None, print)
    assert f"(recognised by its name), so only {sum(few)} of 100 files can" in str(raised.value)
    assert f"{few[0]} to fit" in str(raised.value) and f"{few[1]} to set" in str(raised.value)
    assert "give other images, or a folder of about 500 files or more" in str(raised.value)
    opened.manifest["data"]["name"] = "others"
    chosen = choose_files(photos, opened, None, print)
    assert len(chosen.fit) + len(chosen.calibrate) > 80


@pytest.mark.parametrize("trained", [True, False])
def test_a_large_folder_or_data_set_is_sampled(bundle, tmp_path, monkeypatch, trained):
    """Of the parts that have not trained the model, too: scoring them all could take hours."""
    limits = {"MAX_IMAGES": 25, "MAX_FITTED": 10, "MAX_CALIBRATING": 15, "MIN_IMAGES": 1}
    for name, value in limits.items():
        monkeypatch.setattr(f"export.gate.split.{name}", value)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(800):
        (photos / f"{i}.png").touch()
    opened = open_bundle(bundle)
    splits = {"train": "photos: 640 files by hash of the file name"}
    opened.manifest["data"] = {"name": "photos" if trained else "others", "splits": splits}
    chosen = choose_files(photos, opened, None, print)
    assert (len(chosen.fit), len(chosen.calibrate)) == (10, 15)
    assert bool(chosen.trained) == trained
    parts = {part: ImageSet(np.zeros((40, 8, 8, 3), np.uint8)) for part in PARTS}
    found = choose_rows(Dataset("photos", parts, splits), opened, None, print)
    assert [len(list(images)) for images in found] == [10, 15, 40, 0]


@pytest.mark.parametrize("trained_on", ["model", "network of features", ""])
def test_false_alarms_are_measured_on_images_that_calibrate_nothing(
    bundle, dark, tmp_path, trained_on, capsys, monkeypatch
):
    """Images that a network was trained on calibrate nothing either."""
    monkeypatch.setattr("export.gate.split.MIN_IMAGES", 1)
    photos = tmp_path / "photos"
    for i, image in enumerate(dark.copy()):
        image[0, 0, :2] = divmod(i, 256)  # no two are equal
        (photos / str(i % 7)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(photos / str(i % 7) / f"{i}.png")
    opened = open_bundle(bundle)
    data = {"name": "photos", "splits": {"train": "photos: 240 files by hash of the file name"}}
    if trained_on == "model":
        opened.manifest["data"] = data
    features = data if trained_on == "network of features" else None
    opened.manifest["features"] = {"data": features}
    given = argparse.Namespace(data=str(photos), root=None)
    readers, name = calibrate_command._images(given, opened, features)
    fit, calibration, unseen, trained = map(set, readers)
    said = f"the {trained_on} was trained on photos (recognised by its name): only its parts select"
    assert (said in capsys.readouterr().err) == bool(trained_on)
    used = fit | calibration
    assert unseen and not unseen & used and name == "photos"
    assert len(used) + len(unseen) + len(trained) == len(dark)
    its = {path.read_bytes() for path in photos.rglob("*.png") if part_of(path.name) == "train"}
    assert trained == (its if trained_on else set()) and not used & trained


def test_copies_do_not_calibrate(tiny_bundle, small_images):
    """Neither those of training images nor those of others, whatever kind of file they are."""
    told: list[str] = []
    fit = [*small_images[:30], small_images[0], small_images[100]]
    files = [write_png(image) for image in small_images[20:60]]
    trained = [*small_images[100:110], b"junk"]
    opened = open_bundle(tiny_bundle)
    repeated = [*files, *small_images[50:60], small_images[101]]
    parts = _parts(opened, fit, repeated, trained, told.append)
    kept = [[image.pixels for image in part] for part in parts]
    # Of the ten that both parts have, two fifths fit the density.
    fits = np.array([image_digest(image)[0] < 103 for image in small_images[20:30]])
    shared, both = small_images[20:30], int(fits.sum())
    assert np.array_equal(kept[0], [*small_images[:20], *shared[fits]])
    assert np.array_equal(kept[1], [*shared[~fits], *small_images[30:60]])
    assert f"fitting: left out {12 - both} images: copies of others" in told
    assert "calibration: left out 1 image: copies of training images" in told
    assert f"calibration: left out {10 + both} images: copies of others" in told
    with pytest.raises(CalibrationError, match="calibration: all of 10 images are copies"):
        _parts(opened, fit, small_images[100:110], trained, told.append)


def test_files_that_were_stored_twice_make_no_band_narrower(tiny_bundle, small_images, tmp_path):
    told: list[str] = []
    given = np.repeat(small_images[80:180], 2, axis=0), np.repeat(small_images[:1], REPEATS, axis=0)
    made = calibrate_bundle(
        tiny_bundle, tmp_path / "out", small_images[10:80], [*given[0], *given[1]], "c", told.append
    )
    assert made.exact is not None and len(made.exact.scores) == 100 + REPEATS
    assert "calibration: left out 100 images: copies of others" in told
    often = f"calibration: {REPEATS} images are copies of 1 picture, {REPEATS} or more of each"
    assert any(line.startswith(often) for line in told)
    exact = dataclasses.replace(made.exact, digests=np.repeat(made.exact.digests[:1], 2))
    earlier = dataclasses.replace(made, exact=exact)  # of a version that counted both
    assert set(exact.digests.tolist()) <= digests_of(earlier)


def test_files_that_were_stored_twice_are_divided_as_others_are(tiny_bundle, small_images):
    """Each of two copies may be in either part."""
    told: list[str] = []
    images = small_images[:150]
    fit, calibrate = _parts(open_bundle(tiny_bundle), images, images, (), told.append)
    assert len(fit) + len(calibrate) == 150 and 40 <= len(fit) <= 80
    assert not {image_digest(image.pixels) for image in fit} & {
        image_digest(image.pixels) for image in calibrate
    }
    few = small_images[:12]
    with pytest.raises(CalibrationError, match=r"without copies .*, \d+ images are left to fit"):
        _parts(open_bundle(tiny_bundle), few, small_images[20:100], (), told.append)


def test_grey_images_are_corrupted_as_grey_ones(small_images):
    """Colours, which their camera cannot make, would give them away."""
    coloured = small_images[:4]
    grey = np.repeat(coloured[..., :1], 3, axis=3)
    together, alone = corrupted(np.concatenate([coloured, grey])), corrupted(coloured)
    for name, made in corrupted(grey).items():
        assert (made == made[..., :1]).all() and (made != grey).any(), name
        assert (together[name][4:] == together[name][4:, ..., :1]).all(), name
        assert (alone[name] != alone[name][..., :1]).any() and alone[name].shape == coloured.shape


def test_a_picture_that_repeats_is_not_rejected_for_it(tiny_bundle, small_images, tmp_path):
    """A camera's black frame is unlike all other images, and comes again and again."""
    black = np.zeros_like(small_images[0])
    images = [*small_images[:180], *[black] * 20]
    shuffled = [images[i] for i in np.random.default_rng(0).permutation(len(images))]
    calibrate_bundle(
        tiny_bundle, tmp_path / "out", shuffled[:80], shuffled[80:], "camera", lambda line: None
    )
    (decision,) = Gate(tmp_path / "out", 0.05).check([black])
    assert decision.accepted
    # Nearly always it has been trained on, too; a few copies of a training image are an accident.
    for copies, accepted in ((20, True), (REPEATS, True), (REPEATS - 1, False)):
        out = tmp_path / f"of {copies}"
        made = calibrate_bundle(
            tiny_bundle,
            out,
            small_images[:80],
            [*small_images[80:180], *[black] * copies],
            "camera",
            lambda line: None,
            trained=[black],
        )
        assert made.exact is not None
        assert len(made.exact.scores) == 100 + (copies if accepted else 0)
        assert short_digest(black) not in digests_of(made)  # it may be among other images, too
    with pytest.raises(CalibrationError):
        calibrate_bundle(
            tiny_bundle, tmp_path / "no", [black] * 80, [black] * 80, "camera", lambda line: None
        )


@pytest.mark.parametrize("trained_on", [True, False])
def test_the_test_part_of_a_data_set_calibrates_nothing(tiny_bundle, trained_on):
    parts = {part: ImageSet(np.full((20, 8, 8, 3), i, np.uint8)) for i, part in enumerate(PARTS)}
    splits = {"train": "train[0:20]"}
    opened = open_bundle(tiny_bundle)
    opened.manifest["data"] = {"name": "d" if trained_on else "other", "splits": splits}
    found = choose_rows(Dataset("d", parts, splits), opened, None, print)
    used = [{PARTS[image[0, 0, 0]] for image in images} for images in found]
    rest = {"train", "select", "calibrate"}
    fit, calibrate = ({"select"}, {"calibrate"}) if trained_on else (rest, rest)
    assert used == [fit, calibrate, {"test"}, set()]


@pytest.mark.parametrize("is_resized", [True, False])
def test_a_data_set_that_is_resized_when_read_calibrates_for_resized_images(
    tiny_bundle, small_images, is_resized, tmp_path
):
    """As a folder of the same images does."""
    parts = {part: ImageSet(small_images[i::4]) for i, part in enumerate(PARTS)}
    dataset = Dataset("d", parts, {"train": "train[0:60]"}, is_resized=is_resized)
    fit, calibrate, *_ = choose_rows(dataset, open_bundle(tiny_bundle), None, print)
    made = calibrate_bundle(tiny_bundle, tmp_path / "out", fit, calibrate, "d", print)
    assert made.exact is not None and made.resized is not None
    assert (made.exact is made.resized) == is_resized == (made.exact.resize == "fit")


def test_bulk_scoring_by_name(bundle, dark, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(dark[:30]):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i:02d}.png")
    words = ["score", str(tmp_path / "photos"), "--bundle", str(bundle), "--workers", "1"]
    words += ["--calibration", "night", "--alpha", "0.05"]
    assert main([*words, "--out", str(tmp_path / "scores.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    version = CalibrationPair.load(bundle / "calibration-night.npz").version
    assert {row["calibration"] for row in rows} == {f"night@{version}"}
    expected = Gate(bundle, 0.05).check(dark[:30], "night")
    assert [row["p_value"] for row in rows] == [d.p_value for d in expected]
    capsys.readouterr()
    assert (
        main(["score", str(tmp_path / "photos" / "00.png"), *words[2:4], "--calibration", "x"]) == 2
    )
    assert "there is no calibration 'x'; there are default, night" in capsys.readouterr().err
    with pytest.raises(BulkError, match="was changed meanwhile"):
        FileScorer(
            open_bundle(bundle),
            tmp_path,
            BulkOptions(calibration="night"),
            like=Versions(open_bundle(bundle).digest, "another"),
        )


def test_what_cannot_be_written_is_refused_before_images_are_read(
    bundle, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("ade_cli.calibrate._images", None)
    ill = shutil.copytree(bundle, tmp_path / "ill")
    (ill / "score.onnx").write_bytes(b"")
    for words, message in (
        ([tmp_path, tmp_path / "out"], "is not a bundle: it has no manifest.json"),
        ([tmp_path / "gone", tmp_path / "out"], "is not a bundle: the folder does not exist"),
        ([bundle, "/proc/out"], "/proc/out cannot be written: No such file or directory"),
        ([bundle, "/proc/no/out"], "/proc/no/out cannot be written: No such file or directory"),
        ([bundle, ill], "ill exists: calibrate into a new folder"),
        ([ill, tmp_path / "out"], "score.onnx"),
    ):
        assert main(["calibrate", *map(str, words), "--data", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_errors_of_a_calibration_made_by_hand_name_the_file(bundle, tmp_path):
    bundle = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    own = bundle / CALIBRATION_NAME
    with np.load(own) as arrays:
        whole = dict(arrays)
    for name, array, reason in (
        ("scores", None, "'scores is not a file in the archive'"),
        ("scores", np.array(1.0), r"scores must be finite numbers of shape \(1,\), got \w+ \(\)"),
        ("scores", np.array([None]), "Object arrays cannot be loaded"),
        ("grid", np.array(["a"]), "grid must be finite numbers of shape .*, got <U1"),
        ("mixture_log_weights", np.array(1.0), "mixture_log_weights must be finite numbers"),
        ("names", np.array("bpd"), "iteration over a 0-d array"),
        ("spread", whole["spread"] * 0, "it has no scores, no bpd, or a spread that is not pos"),
        ("resize", np.array("no"), "resize must be empty or fit, got 'no'"),
        ("digests", np.array(1.0), "digests must be one uint64"),
    ):
        made = {key: value for key, value in whole.items() if key != name}
        np.savez(tmp_path / "made.npz", **made, **({} if array is None else {name: array}))
        with pytest.raises(CalibrationError, match=f"made.npz is not a calibration: {reason}"):
            CalibrationPair.load(tmp_path / "made.npz")
    np.savez(tmp_path / "made.npz", **{k: v for k, v in whole.items() if k != "scores"})
    with ZipFile(tmp_path / "made.npz", "a") as archive:
        archive.writestr("scores", "no array")
    with pytest.raises(CalibrationError, match="made.npz is not a calibration"):
        CalibrationPair.load(tmp_path / "made.npz")
    fields = open_bundle(bundle).manifest
    np.savez(own, **{**whole, "scores": np.array(1.0)})
    write_manifest(bundle, fields)
    with pytest.raises(CalibrationError, match=f"{own} is not a calibration: scores must be"):
        InferenceEngine(bundle, device="cpu", operations=["score"])


def test_a_calibration_is_no_bomb(bundle, tmp_path, monkeypatch):
    with np.load(bundle / CALIBRATION_NAME) as arrays:
        whole = dict(arrays)

    def refused(reason, compression=ZIP_DEFLATED, **changed):
        path = tmp_path / "made.npz"
        with ZipFile(path, "w", compression) as archive:
            for name, array in (whole | changed).items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array)
        tracemalloc.start()
        with pytest.raises(CalibrationError, match=reason):
            CalibrationPair.load(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
        tracemalloc.stop()

    monkeypatch.setattr(file_module, "MAX_CALIBRATION_BYTES", 4 * 2**20)
    refused("at most 4,194,304 bytes, got 3", grid=np.zeros(32 * 2**20, np.uint8))
    refused("must be stored or deflated", ZIP_LZMA)
    refused("at most 1000 arrays, got 10", **{f"x{i}": np.array(0) for i in range(1000)})
    # Such arrays take no bytes, and a loop over them lasts for hours.
    refused(r"names must be at most 1000, got \(1000000000, 0\)", names=np.empty((10**9, 0)))


def test_text_of_a_calibration_controls_no_terminal_and_no_log(bundle, tmp_path):
    evil = "0\x1b]52;c;eA==\x07\n2025-01-01 ERROR forged"
    with np.load(bundle / CALIBRATION_NAME) as arrays:
        whole = dict(arrays)
    names = whole["names"].tolist()
    for name, value in (
        *((name, evil) for name in ("webp", "estimator", "resize")),
        ("webp", "9" * 1000),
        ("names", [*names[:-1], evil]),
        ("names", [*names[:-1], "x" * 1000]),
        ("\x1b", "x"),
    ):
        np.savez(tmp_path / "made.npz", **{**whole, name: np.array(value)})
        if name == "\x1b":  # a damaged member, which messages name
            content = bytearray((tmp_path / "made.npz").read_bytes())
            content[content.index(b"\x1b.npy") + 150] ^= 1
            (tmp_path / "made.npz").write_bytes(content)
        with pytest.raises(CalibrationError) as refused:
            CalibrationPair.load(tmp_path / "made.npz")
        message = str(refused.value).removeprefix(str(tmp_path))
        assert message.isprintable() and len(message) < 300


def test_a_damaged_name_of_an_array_hides_no_calibration(bundle, tmp_path):
    """Without the second one, the first would judge resized images."""
    own = InferenceEngine(bundle, device="cpu", operations=["score"]).calibrations
    assert own.exact is not None and own.resized is not None
    any_size = dataclasses.replace(own.exact, resize="fit")
    content = bytearray(dataclasses.replace(own, exact=any_size).to_bytes())
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    assert CalibrationPair.load(path).resized is not CalibrationPair.load(path).exact
    for name in (b"resized_scores.npy", b"webp.npy", b"digests.npy"):
        damaged = content.copy()
        damaged[content.rfind(b"PK\x01\x02", 0, content.rfind(name)) + 46] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CalibrationError, match="damaged"):
            CalibrationPair.load(path)
