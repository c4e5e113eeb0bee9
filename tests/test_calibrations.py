"""Several calibrations in one bundle: which decides, changes while it is used, and feedback."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import stat
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_LZMA, ZipFile

import numpy as np
import pytest
from PIL import Image

import export.gate.feedback as feedback_module
import serving.verdict.calibration_file as file_module
import serving.verdict.store as store_module
from ade_base.pictures.show import coder_version, write_png
from ade_cli import calibrate as calibrate_command
from ade_cli.main import main
from ade_client.contract import DEFAULT
from export.gate.calibrate import _parts, calibrate_bundle, calibrate_into
from export.gate.corruptions import corrupted
from export.gate.feedback import _report_unusual, give_feedback
from export.gate.images import digests_of, readable
from export.gate.split import choose_files, choose_rows
from extensions.gate_reports.ood_bench import bench
from extensions.gate_reports.verbs import ood_bench
from serving.api.service import Service
from serving.bulk import BulkError, BulkOptions, FileScorer, Versions
from serving.engine.bundle import (
    CALIBRATION_NAME,
    MANIFEST_NAME,
    open_bundle,
    verify_bundle,
    write_manifest,
)
from serving.engine.calibrations import open_calibrations, seen_file
from serving.engine.engine import InferenceEngine, Score
from serving.engine.noise import image_digest, short_digest
from serving.gate import Gate
from serving.ingest.requests import RawRequest
from serving.verdict.calibration import CalibrationError
from serving.verdict.calibration_file import Calibrations
from serving.verdict.decision import decide
from serving.verdict.false_alarms import false_alarm_band
from serving.verdict.store import (
    ALL,
    FOLDER,
    CalibrationStore,
    UnknownCalibration,
    check_name,
    path_of,
    write_calibrations,
)
from tests.helpers import full_disk, wait_for
from training.data import PARTS, REPEATS, DataError, Dataset, ImageSet
from training.datasets.files import part_of


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may add to."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def dark(small_images: np.ndarray) -> np.ndarray:
    """Images of a camera at night."""
    return small_images // 8


@pytest.fixture(scope="module")
def night_file(
    tiny_bundle: Path, dark: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A calibration for that camera, by the command."""
    folder = tmp_path_factory.mktemp("night")
    own = Path(shutil.copytree(tiny_bundle, folder / "bundle"))
    np.savez(folder / "dark.npz", images=dark)
    made = calibrate_into(own, "night", dark[:150], dark[150:], "dark")
    assert made.name == "night" and len(made.version) == 12
    verify_bundle(own)  # nothing of the manifest has changed
    return path_of(own, "night")


def add(bundle: Path, file: Path, name: str) -> None:
    """Add a calibration as an operator may: copy it under another name, then move it."""
    path = path_of(bundle, name)
    path.parent.mkdir(exist_ok=True)
    shutil.copy(file, path.with_name(".new"))
    os.replace(path.with_name(".new"), path)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "CHECK_S", 0.0)


def test_each_calibration_judges_its_own_images(
    bundle: Path, night_file: Path, dark: np.ndarray
) -> None:
    add(bundle, night_file, "night")
    gate = Gate(bundle, alpha=0.05)
    by_own, by_night = gate.check(dark[:100]), gate.check(dark[:100], "night")
    assert np.mean([d.accepted for d in by_own]) < 0.5 < np.mean([d.accepted for d in by_night])
    assert by_night[0].calibration == {
        "name": "night",
        "version": Calibrations.load(night_file).version,
    }
    assert by_own[0].calibration is not None and by_own[0].calibration["name"] == "default"
    # Judged together, each image gets the verdict of its own calibration.
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    judges = [engine.store.get(name) for name in ("default", "night") * 5]
    together = engine.score(dark[:10], calibrations=judges)
    assert [score.verdict.p_value for score in together] == [  # type: ignore[union-attr]
        (by_night if i % 2 else by_own)[i].p_value for i in range(10)
    ]
    with pytest.raises(UnknownCalibration, match="'day'; there are default, night"):
        gate.check(dark[:1], "day")


def test_requests_that_are_computed_together_are_judged_apart(
    bundle: Path, night_file: Path, dark: np.ndarray
) -> None:
    """An unknown name is an error of its own request only; the error lists the names."""
    add(bundle, night_file, "night")
    service = Service("score", InferenceEngine(bundle, device="cpu", operations=["score"]))
    images = [base64.b64encode(write_png(image)).decode() for image in dark[:3]]

    def request(**parameters: object) -> RawRequest:
        return RawRequest("application/json", {"images": images, "alpha": 0.05, **parameters})

    asked = [{}, {"calibration": "night"}, {"calibration": "day"}, {"calibration": 5}]
    answers = service.answer([request(**parameters) for parameters in asked])
    bodies = [json.loads(answer.body) for answer in answers]
    assert [answer.status for answer in answers] == [200, 200, 422, 422]
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


def test_files_come_change_and_go_while_a_gate_runs(
    bundle: Path, night_file: Path, dark: np.ndarray
) -> None:
    gate = Gate(bundle, alpha=0.05)
    with pytest.raises(UnknownCalibration):
        gate.check(dark[:1], "night")
    add(bundle, night_file, "night")
    first = gate.check(dark[:1], "night")[0]
    read = Calibrations.load(night_file, "night")
    assert read.exact is not None
    rows = read.exact.scores
    half = dataclasses.replace(read.exact, scores=rows[::2], reference=read.exact.reference[::2])
    (bundle / "other.npz").write_bytes(dataclasses.replace(read, exact=half).to_bytes())
    add(bundle, bundle / "other.npz", "night")
    second = gate.check(dark[:1], "night")[0]
    assert first.calibration != second.calibration and first.p_value != second.p_value
    path_of(bundle, "night").unlink()
    with pytest.raises(UnknownCalibration):
        gate.check(dark[:1], "night")
    assert gate.check(dark[:1])[0].calibration is not None


def test_the_first_request_for_a_new_name_finds_it(
    bundle: Path, night_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the folder was read a moment ago."""
    store = InferenceEngine(bundle, device="cpu", operations=["score"]).store
    monkeypatch.setattr(store_module, "CHECK_S", 1e9)
    with pytest.raises(UnknownCalibration):
        store.get("night")
    add(bundle, night_file, "night")
    assert store.get("night").name == "night"


def test_a_damaged_file_leaves_the_former_content_in_use_and_is_reported(
    bundle: Path, night_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(bundle, night_file, "night")
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    before = engine.store.get("night")
    whole = night_file.read_bytes()
    read = Calibrations.load(night_file)
    assert read.exact is not None
    wild = dataclasses.replace(read.exact, scores=read.exact.scores * np.nan)
    unsorted = dataclasses.replace(read.exact, scores=read.exact.scores[::-1])
    normal = read.exact.normal
    upside_down = dataclasses.replace(normal, grid=normal.grid[::-1])
    falling = dataclasses.replace(read.exact, normal=upside_down)
    other = dataclasses.replace(read, model="0" * 64)
    fewer = dataclasses.replace(read.exact, names=("bpd", *read.exact.names[2:], "new"))
    stray = bundle / "calibrations" / "no name.npz"
    stray.touch()  # no calibration is missing for it
    for damaged, reason in (
        (b"", "is not a calibration"),
        (whole[:-1000], "is not a calibration"),
        (whole[:5000] + bytes(5000) + whole[10000:], "is not a calibration"),
        (dataclasses.replace(read, exact=wild).to_bytes(), "scores must be finite"),
        (dataclasses.replace(read, exact=unsorted).to_bytes(), "scores must be sorted"),
        (dataclasses.replace(read, exact=falling).to_bytes(), "grid must be sorted"),
        (dataclasses.replace(read, exact=fewer).to_bytes(), "does not compute: new"),
        (other.to_bytes(), "the weights 000000000000, these are"),
    ):
        caplog.clear()
        (bundle / "damaged").write_bytes(damaged)
        add(bundle, bundle / "damaged", "night")
        assert engine.store.get("night") is before
        engine.store.get("night")
        assert reason in engine.store.broken["night"]
        assert len([r for r in caplog.records if "night cannot be used" in r.message]) == 1
        assert engine.store.missing == []
        # One that starts now has nothing to fall back on.
        fresh = InferenceEngine(bundle, device="cpu", operations=["score"])
        with pytest.raises(UnknownCalibration):
            fresh.store.get("night")
        assert fresh.store.missing == ["night"] and len(fresh.store.broken) == 2
        with pytest.raises(CalibrationError, match=reason):
            fresh.store.usable("night")
    stray.unlink()
    add(bundle, night_file, "night")
    assert engine.store.get("night").version == before.version and not engine.store.broken
    os.mkfifo(bundle / "calibrations" / "pipe.npz")  # another thread is reading: do not wait
    leads_in_circles(bundle / "calibrations" / "circle.npz")
    Path(os.fsdecode(os.fsencode(bundle / "calibrations") + b"/\xff.npz")).touch()
    add(bundle, night_file, "night")
    (bundle / "calibrations" / "a b.npz").write_bytes(whole)
    engine.store.refresh()
    assert set(engine.store.names) == {"default", "night"}
    assert set(engine.store.broken) == {"pipe", "a?b", "circle", "?"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [  # as of a disk or a network that failed once, and of a machine that was full
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_file_that_could_not_be_opened_is_read_once_it_can(
    bundle: Path,
    night_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str,
) -> None:
    store = InferenceEngine(bundle, device="cpu", operations=["score"]).store
    add(bundle, night_file, "night")
    with monkeypatch.context() as patch:

        def refuse(path: Path, limit: int) -> bytes:
            raise error

        patch.setattr(file_module, "read_file", refuse)
        store.refresh()
        assert reason in store.broken["night"]
    assert store.get("night").exact is not None and not store.broken


def test_a_change_is_noticed_even_if_size_and_time_of_the_file_stay(
    bundle: Path, night_file: Path
) -> None:
    add(bundle, night_file, "night")
    store = InferenceEngine(bundle, device="cpu", operations=["score"]).store
    path = path_of(bundle, "night")
    time = path.stat().st_mtime_ns
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, ns=(time, time))
    store.refresh()
    assert "is not a calibration" in store.broken["night"]


def damage(path: Path) -> None:
    path.write_bytes(b"damaged")


def leads_nowhere(path: Path) -> None:
    path.symlink_to("gone.npz")


def leads_in_circles(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [damage, leads_nowhere, leads_in_circles])
def test_a_default_that_cannot_be_read_from_the_start_gives_no_verdict(
    bundle: Path,
    small_images: np.ndarray,
    make: Callable[[Path], None],
    capsys: pytest.CaptureFixture,
) -> None:
    """The bundle's own calibration would accept other images than the user's."""
    (bundle / "calibrations").mkdir()
    default = bundle / "calibrations" / "default.npz"
    make(default)
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    assert engine.store.get().exact is None and "default" in engine.store.broken
    assert engine.store.missing == ["default"]
    (score,) = engine.score(small_images[:1])
    assert isinstance(score, Score) and score.verdict is None
    assert str(decide(None, score.calibrations, False, 0.1).reason).startswith("calibration_broken")
    with pytest.raises(CalibrationError):
        Gate(bundle)
    words = ["ood-bench", str(bundle), "--id", "images.npy"]
    assert main([*words, "--out", str(bundle.with_name("out"))]) == 2
    # Not "is not calibrated".
    assert "default.npz" in capsys.readouterr().err.splitlines()[-1]
    default.unlink()  # after which the bundle's own decides once the service is restarted
    engine.store.refresh()
    assert engine.store.get().exact is None and "default" in engine.store.broken
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    assert engine.store.get().exact is not None and not engine.store.broken
    make(default)  # beside a service that runs
    engine.store.refresh()
    assert engine.store.get().exact is None and "default" in engine.store.broken
    assert engine.store.missing == ["default"]


def test_a_link_that_is_moved_brings_no_calibrations_of_another_bundle(
    bundle: Path, night_file: Path
) -> None:
    add(bundle, night_file, "night")
    other = bundle.with_name("later")
    shutil.copytree(bundle, other)
    (other / "calibrations" / "night.npz").rename(other / "calibrations" / "day.npz")
    link = bundle.with_name("current")
    link.symlink_to(bundle)
    gate = Gate(link)
    link.unlink()
    link.symlink_to(other)
    store = gate._engine.store
    store.refresh()
    assert set(store.names) == {"default", "night"}
    add(bundle, night_file, "evening")
    store.refresh()
    assert "evening" in store.names and "day" not in store.names


def test_whoever_reads_the_bundle_reads_its_calibrations(
    bundle: Path, dark: np.ndarray, tmp_path: Path
) -> None:
    """A service may run as another user than the command that writes them."""
    Image.fromarray(dark[0]).save(tmp_path / "new.png")
    path = bundle / FOLDER / "default.npz"
    before = os.umask(0o077)
    try:
        for mode, umask in ((0o755, 0o077), (0o750, 0o022)):
            shutil.rmtree(path.parent, ignore_errors=True)
            bundle.chmod(mode)
            if os.geteuid() == 0:
                os.chown(bundle, 12345, 12345)
            os.umask(umask)
            for change in ([tmp_path / "new.png"], []), ([], [tmp_path / "new.png"]):
                give_feedback(bundle, "default", *change)
                for one in (path, path.parent):
                    found = one.stat()
                    needed = mode & (0o666 if one == path else 0o777)
                    assert stat.S_IMODE(found.st_mode) & needed == needed
                    assert os.geteuid() or (found.st_uid, found.st_gid) == (12345, 12345)
    finally:
        os.umask(before)


def test_feedback_stays_with_the_bundle_that_a_link_led_to(
    bundle: Path, dark: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(dark[0]).save(tmp_path / "new.png")
    later, link = bundle.with_name("later"), bundle.with_name("current")
    shutil.copytree(bundle, later)
    link.symlink_to(bundle)
    read = feedback_module._read

    def read_while_the_link_moves(*given: Any) -> Any:
        link.unlink()
        link.symlink_to(later)
        return read(*given)

    monkeypatch.setattr(feedback_module, "_read", read_while_the_link_moves)
    assert give_feedback(link, "default", [tmp_path / "new.png"], []).joined
    assert (bundle / FOLDER / "default.npz").exists() and not (later / FOLDER).exists()


def test_what_is_broken_stays_reported_while_the_folder_cannot_be_read(
    bundle: Path, night_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(bundle, night_file, "night")
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    (bundle / "damaged").write_bytes(b"damaged")
    add(bundle, bundle / "damaged", "night")
    engine.store.refresh()
    assert set(engine.store.broken) == {"night"}
    with monkeypatch.context() as patch:

        def refuse(folder: Path) -> None:
            raise PermissionError(13, "Permission denied")

        patch.setattr(store_module, "_files", refuse)
        engine.store.refresh()
        assert set(engine.store.broken) == {"night", "/"}
        fresh = InferenceEngine(bundle, device="cpu", operations=["score"])
        assert fresh.store.get().exact is None  # who knows what the folder holds?
    engine.store.refresh()
    fresh.store.refresh()
    assert set(engine.store.broken) == {"night"} and fresh.store.get().exact is not None


def test_a_folder_that_vanishes_leaves_its_calibrations_in_use(
    bundle: Path, night_file: Path, dark: np.ndarray
) -> None:
    """A bundle that was moved or unmounted must not change what the gate accepts."""
    (bundle / FOLDER).mkdir()
    gate = Gate(bundle)
    (bundle / FOLDER).rmdir()  # of a folder without files nothing is missed
    assert gate.check(dark[:1])[0].calibration is not None and not gate._engine.store.broken
    add(bundle, night_file, "default")
    before = gate.check(dark[:1])
    bundle.rename(bundle.with_name("elsewhere"))
    assert gate.check(dark[:1]) == before
    assert gate._engine.store.broken == {"/": f"{bundle / FOLDER} is gone"}
    bundle.with_name("elsewhere").rename(bundle)
    assert gate.check(dark[:1]) == before and not gate._engine.store.broken
    path_of(bundle, "default").unlink()
    assert gate.check(dark[:1]) == before
    assert "restart the service" in gate._engine.store.broken["default"]
    # Of the bundle's own calibration alone, a restarted service knows.
    assert Gate(bundle).check(dark[:1])[0].calibration != before[0].calibration


def test_a_bundle_that_is_gone_at_the_start_gives_no_verdict(
    bundle: Path, night_file: Path, dark: np.ndarray, tmp_path: Path
) -> None:
    """Its folder may have held ``default.npz``: the bundle's own would accept other images."""
    add(bundle, night_file, "default")
    copy = Path(shutil.copytree(bundle, tmp_path / "copy", ignore=shutil.ignore_patterns(FOLDER)))
    bundle.rename(bundle.with_name("elsewhere"))

    def start() -> InferenceEngine:  # as a worker does, with a copy of the served bundle
        return InferenceEngine(
            copy, device="cpu", operations=["score"], calibrations=bundle / FOLDER
        )

    engine = start()
    (score,) = engine.score(dark[:1])
    assert isinstance(score, Score) and score.verdict is None
    gone = {"/": f"{bundle} no longer holds the bundle that is served"}
    assert engine.store.broken == gone
    assert engine.store.missing == ["default"]
    bundle.with_name("elsewhere").rename(bundle)
    expected = Calibrations.load(night_file).version
    assert engine.store.get().version == expected and not engine.store.broken
    # So does an empty folder in its place, as of a mount, and a bundle that replaced it.
    bundle.rename(bundle.with_name("elsewhere"))
    bundle.mkdir()
    another = {**json.loads((copy / MANIFEST_NAME).read_text()), "name": "another"}
    for manifest, has_folder in ((None, False), (another, False), (another, True)):
        if manifest is not None:
            (bundle / MANIFEST_NAME).write_text(json.dumps(manifest))
        if has_folder:  # without the file that would decide
            add(bundle, night_file, "night")
        engine = start()
        assert engine.store.get().exact is None and engine.store.missing == ["default"]
        assert engine.store.broken == gone
    shutil.rmtree(bundle)
    bundle.with_name("elsewhere").rename(bundle)
    # A bundle without named calibrations is judged by its own once it is back.
    bundle.rename(bundle.with_name("elsewhere"))
    engine = start()
    assert engine.store.get().exact is None
    shutil.rmtree(bundle.with_name("elsewhere") / FOLDER)
    bundle.with_name("elsewhere").rename(bundle)
    assert engine.store.get().exact is not None and not engine.store.broken


def test_a_bundle_that_is_replaced_leaves_its_calibrations_in_use(
    bundle: Path, night_file: Path
) -> None:
    add(bundle, night_file, "default")
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    version, manifest = engine.store.get().version, (bundle / MANIFEST_NAME).read_text()
    another = {**json.loads(manifest), "name": "another"}
    (bundle / MANIFEST_NAME).write_text(json.dumps(another))
    (bundle / FOLDER / "default.npz").unlink()
    engine.store.refresh()
    assert engine.store.get().version == version
    assert engine.store.broken == {"/": f"{bundle} no longer holds the bundle that is served"}
    (bundle / MANIFEST_NAME).write_text(manifest)
    engine.store.refresh()
    assert engine.store.get().version == version and "default" in engine.store.broken


def test_a_mount_that_goes_away_leaves_its_calibrations_in_use(
    bundle: Path, night_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What remains is its empty mount point, on the disk of the bundle."""
    add(bundle, night_file, "night")
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    version = engine.store.get("night").version
    (bundle / FOLDER / "night.npz").rename(bundle / "night.npz")
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "device_of", lambda folder: -1)
        engine.store.refresh()
        assert engine.store.get("night").version == version
        reason = f"{bundle / FOLDER} is on another disk than before, without night"
        assert engine.store.broken == {"/": reason}
    (bundle / "night.npz").rename(bundle / FOLDER / "night.npz")
    engine.store.refresh()
    assert engine.store.get("night").version == version and not engine.store.broken
    with monkeypatch.context() as patch:  # mounted again, by another number
        patch.setattr(store_module, "device_of", lambda folder: -1)
        engine.store.refresh()
    engine.store.refresh()
    (bundle / FOLDER / "night.npz").unlink()  # on the same disk: the operator removed it
    engine.store.refresh()
    assert "night" not in engine.store.names and not engine.store.broken


def test_a_mount_that_goes_away_while_it_is_read_is_not_forgotten(
    bundle: Path, night_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(bundle, night_file, "night")
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    version = engine.store.get("night").version
    files, device_of = store_module._files, store_module.device_of

    def after_the_unmount(folder: Path) -> dict[str, Any]:
        if (folder / "night.npz").exists():
            (folder / "night.npz").rename(bundle / "night.npz")
            monkeypatch.setattr(store_module, "device_of", lambda folder: device_of(folder) + 1)
        return files(folder)

    monkeypatch.setattr(store_module, "_files", after_the_unmount)
    for _ in range(2):
        engine.store.refresh()
        assert engine.store.get("night").version == version and ALL in engine.store.broken


def test_feedback_does_not_replace_a_calibration_that_is_gone(
    bundle: Path, dark: np.ndarray, tmp_path: Path
) -> None:
    """By the bundle's own, by which it would not have decided."""
    Image.fromarray(dark[0]).save(tmp_path / "new.png")
    assert give_feedback(bundle, "default", [tmp_path / "new.png"], []).joined
    path_of(bundle, "default").unlink()
    with pytest.raises(CalibrationError, match="default.npz is gone, although feedback changed"):
        give_feedback(bundle, "default", [tmp_path / "new.png"], [])
    assert not path_of(bundle, "default").exists()
    assert give_feedback(bundle, "default", [tmp_path / "new.png"], [], force=True).joined


def test_a_default_that_goes_away_before_it_could_be_read_is_missed(
    bundle: Path, night_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Be it while it is read, or because its disk fails first and is unmounted then."""
    add(bundle, night_file, "default")

    load = Calibrations.load

    def unmounted(path: Path, name: str = DEFAULT) -> Calibrations:
        if path.parent.name != FOLDER:
            return load(path, name)
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        raise CalibrationError(f"{path} cannot be read") from OSError(5, "Input/output error")

    monkeypatch.setattr(Calibrations, "load", unmounted)
    store = open_calibrations(open_bundle(bundle), bundle / FOLDER)
    for _ in range(2):
        assert store.get().exact is None and store.missing == ["default"]
        store.refresh()
    monkeypatch.undo()
    add(bundle, night_file, "default")
    store.refresh()
    assert store.get().version == Calibrations.load(night_file).version and not store.broken


def test_a_storage_that_hangs_stops_no_request(
    bundle: Path, dark: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it answers again, and whatever name a request has."""
    (bundle / FOLDER).mkdir(exist_ok=True)
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    (before,) = engine.score(dark[:1])
    answers = threading.Event()

    def hanging(folder: Path) -> dict[str, Any]:
        answers.wait()
        return files(folder)

    files = store_module._files
    monkeypatch.setattr(store_module, "_files", hanging)
    monkeypatch.setattr(store_module, "PATIENCE_S", 0.01)
    monkeypatch.setattr(store_module, "LOOKUP_S", 0.02)
    monkeypatch.setattr(store_module, "CHECK_S", 0.0)
    assert engine.score(dark[:1], calibrations=[engine.store.get()]) == [before]
    with pytest.raises(UnknownCalibration, match="cannot be used"):
        engine.store.get("other")
    assert "does not answer" in engine.store.broken["/"]
    answers.set()
    monkeypatch.setattr(store_module, "PATIENCE_S", 60.0)
    engine.store.refresh()  # waits for the reading that hung
    engine.store.refresh()
    assert engine.store.broken == {}
    monkeypatch.setattr(store_module, "PATIENCE_S", 0.0)  # storage that is slow does not hang
    monkeypatch.setattr(store_module, "LOOKUP_S", 60.0)
    assert engine.store.usable() is engine.store.get()


def test_a_machine_without_room_for_a_thread_keeps_what_was_read(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_calibrations(open_bundle(bundle), bundle / FOLDER)
    before = store.get()

    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(store_module, "CHECK_S", 0.0)
    monkeypatch.setattr(threading.Thread, "start", full)
    assert store.get() is before and "no room for a thread" in store.broken["/"]


def test_a_calibration_that_could_not_be_read_is_not_written(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = open_calibrations(open_bundle(bundle), None).get()
    monkeypatch.setattr(file_module, "MAX_CALIBRATION_BYTES", 2**20 + 1000)
    with pytest.raises(CalibrationError, match="may take at most"):
        made.to_bytes()


def test_a_folder_that_is_lost_while_it_is_read_does_not_calibrate(tmp_path: Path) -> None:
    paths = [tmp_path / "images" / f"{i}.png" for i in range(20)]
    paths[0].parent.mkdir()
    for path in paths:
        path.touch()
    read = readable(iter(paths), lambda line: None)
    for _ in range(10):
        next(read)
    paths[0].parent.rename(tmp_path / "unmounted")
    with pytest.raises(DataError, match="10 of 20 files cannot be read now"):
        list(read)


def test_a_worker_that_restarts_without_the_mount_gives_no_verdict(
    bundle: Path, night_file: Path, tmp_path: Path
) -> None:
    """Its service decides by ``default.npz``, so it must not decide by the bundle's own."""
    folder, memory = bundle / FOLDER, seen_file(open_bundle(bundle), tmp_path / "memory")

    def start() -> CalibrationStore:
        return open_calibrations(open_bundle(bundle), folder, memory)

    before = start()
    assert before.get().exact is not None and not before.broken
    add(bundle, night_file, "default")
    start()
    folder.rename(bundle / "unmounted")
    store = start()
    assert store.get().exact is None and store.missing == ["default"]
    assert store.broken == {"/": f"{folder} is gone"}
    folder.mkdir()  # such as its mount point
    for one in (store, start(), before):  # the last has not looked until now
        one.refresh()
        assert one.get().exact is None and one.missing == ["default"]
        assert one.broken["default"].startswith(f"{folder / 'default.npz'} is gone")
    add(bundle, night_file, "night")  # nor does another file in the folder mean that it went
    assert store.get("night").exact is not None and store.get().exact is None
    shutil.rmtree(folder)
    (bundle / "unmounted").rename(folder)
    for one in (store, before):
        one.refresh()
        assert one.get().version == Calibrations.load(night_file).version and not one.broken
    # A restarted service has another memory, and another bundle in the folder never had one.
    path_of(bundle, "default").unlink()
    assert start().missing == ["default"]
    memory.unlink()
    assert start().get().exact is not None and not start().broken


def test_a_memory_that_cannot_be_written_stops_no_worker(
    bundle: Path, night_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(bundle, night_file, "default")
    (tmp_path / "memory").touch()
    seen = tmp_path / "memory" / "seen"
    store = open_calibrations(open_bundle(bundle), bundle / FOLDER, seen)
    store.refresh()
    assert store.get().version == Calibrations.load(night_file).version and not store.broken
    (warning,) = (one for one in caplog.messages if "cannot be made" in one)
    assert warning.endswith("File exists")
    # It is made as soon as it can be, even if the file has gone by then.
    (tmp_path / "memory").unlink()
    path_of(bundle, "default").unlink()
    store.refresh()
    assert seen.exists() and "default" in store.broken


def test_another_bundle_in_the_folder_leaves_nothing_to_miss(
    bundle: Path, night_file: Path, tmp_path: Path
) -> None:
    """It was put there by mistake; once the former one is back, its own calibration decides."""
    seen = tmp_path / "seen"
    store = open_calibrations(open_bundle(bundle), bundle / FOLDER, seen)
    own = store.get().version
    bundle.rename(bundle.with_name("former"))
    shutil.copytree(bundle.with_name("former"), bundle)
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    (bundle / MANIFEST_NAME).unlink()
    (bundle / MANIFEST_NAME).write_text(json.dumps({**manifest, "made_by": "another"}))
    write = Calibrations.load(night_file)
    (bundle / FOLDER).mkdir(exist_ok=True)
    path_of(bundle, "default").write_bytes(night_file.read_bytes())
    store.refresh()
    assert store.get().version == own and ALL in store.broken and write.version != own
    shutil.rmtree(bundle)
    bundle.with_name("former").rename(bundle)
    (bundle / FOLDER).mkdir(exist_ok=True)
    store.refresh()
    assert store.get().version == own and not store.broken and not seen.exists()


def test_a_bundle_that_is_calibrated_again_is_where_it_was(bundle: Path) -> None:
    """`ade calibrate` opens it without its own calibration."""
    store = open_calibrations(open_bundle(bundle).uncalibrated(), bundle / FOLDER)
    assert not store.broken


def test_a_link_to_a_folder_that_is_not_mounted_gives_no_verdict(
    bundle: Path, night_file: Path, dark: np.ndarray, tmp_path: Path
) -> None:
    add(bundle, night_file, "default")
    target = tmp_path / "mounted"
    (bundle / FOLDER).rename(target)
    (bundle / FOLDER).symlink_to(target)
    target.rename(tmp_path / "unmounted")
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    (score,) = engine.score(dark[:1])
    assert isinstance(score, Score) and score.verdict is None
    with pytest.raises(UnknownCalibration, match="the file of the calibration 'night' cannot be"):
        engine.store.get("night")
    (tmp_path / "unmounted").rename(target)
    assert engine.store.get().version == Calibrations.load(night_file).version


def test_readers_see_a_whole_calibration_while_it_is_replaced(
    bundle: Path, night_file: Path
) -> None:
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    read = Calibrations.load(night_file, "night")
    assert read.exact is not None
    files = []
    for i in range(2):
        few = dataclasses.replace(
            read.exact, scores=read.exact.scores[i:], reference=read.exact.reference[i:]
        )
        files.append(bundle / f"{i}.npz")
        files[i].write_bytes(dataclasses.replace(read, exact=few).to_bytes())
    sizes = {Calibrations.load(file).version: 150 - i for i, file in enumerate(files)}
    add(bundle, files[0], "night")
    engine.store.refresh()
    versions = list(sizes)
    stop, seen = threading.Event(), Counter[str]()

    def look() -> None:
        while not stop.is_set():
            found = engine.store.get("night")
            assert found.exact is not None and len(found.exact.scores) == sizes[found.version]
            seen[found.version] += 1

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(look) for _ in range(4)]
        try:
            for turn in range(20):
                version = versions[turn % 2]
                before = seen[version]
                add(bundle, files[turn % 2], "night")
                wait_for(lambda version=version, before=before: seen[version] > before)
        finally:
            stop.set()
            for reader in readers:
                reader.result()  # raises what ended it


def test_the_folder_is_looked_at_once_a_second(
    night_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "CHECK_S", 1.0)
    looks = []
    whole = store_module._files
    monkeypatch.setattr(store_module, "_files", lambda folder: looks.append(1) or whole(folder))
    store = CalibrationStore(Calibrations(), night_file.parent, "", [])
    for _ in range(100):
        store.get()
    assert len(looks) == 1
    monkeypatch.setattr(store_module.time, "monotonic", lambda: store._checked + 1.5)
    store.get()
    assert len(looks) == 2


def test_a_file_of_any_name_disables_no_other(bundle: Path) -> None:
    """``*.npz`` is what a shell makes of a pattern without a match."""
    folder = bundle / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "*.npz").write_bytes(b"nothing")
    (folder / "night.npz").write_bytes(b"nothing")
    store = InferenceEngine(bundle, device="cpu", operations=["score"]).store
    assert store.usable().exact is not None
    with pytest.raises(UnknownCalibration, match="file of the calibration 'night' cannot be used"):
        store.get("night")


def test_files_that_cannot_be_used_are_reported_in_order(tmp_path: Path) -> None:
    """Not as the disk lists them: an upgrade names the first."""
    for name in "dafcbeg":
        (tmp_path / f"{name}.npz").write_bytes(b"nothing")
    store = CalibrationStore(Calibrations(), tmp_path, "", [])
    assert list(store.broken) == list("abcdefg")


def test_a_file_with_too_long_a_name_disables_no_other(bundle: Path) -> None:
    """Not even the one whose name is the beginning of its own."""
    folder = bundle / FOLDER
    folder.mkdir(exist_ok=True)
    for length in (64, 65):
        (folder / f"{'x' * length}.npz").write_bytes(b"nothing")
    store = InferenceEngine(bundle, device="cpu", operations=["score"]).store
    assert "at most 64 letters" not in store.broken["x" * 64]
    assert "at most 64 letters" in store.broken["x" * 63 + "?"]


def test_names() -> None:
    for name in ("camera-3", "a", "Tenant_1.eu", "x" * 64):
        check_name(name)
    for name in ("", "../x", ".hidden", "a/b", "x" * 65, "ä", "a b"):
        with pytest.raises(CalibrationError, match="must have at most 64"):
            check_name(name)


def test_the_command_adds_a_calibration(
    bundle: Path, dark: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(dark[:60]):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
    data = ["--data", str(tmp_path / "photos")]
    into = ["calibrate", str(bundle), *data, "--into", str(bundle)]
    (tmp_path / "photos" / "a2.png").write_bytes(b"junk")
    assert main([*into, "--name", "night"]) == 0
    version = InferenceEngine(bundle, operations=["score"]).store.get("night").version
    said = capsys.readouterr().err
    assert f"added calibration night, version {version}" in said
    assert f": left out 1 image: {tmp_path / 'photos' / 'a2.png'}: not an image" in said
    (tmp_path / "photos" / "a2.png").unlink()
    for words, message in (
        (["calibrate", str(bundle), *data], "give either OUT"),
        (into, "--into BUNDLE and --name NAME go together"),
        ([*into, "--name", "../night"], "must have at most 64"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    # A name that stands for the bundle's own calibration takes its place, here and not in a copy.
    assert main([*into, "--name", "default"]) == 0
    assert InferenceEngine(bundle, operations=["score"]).calibration is not None
    made = InferenceEngine(bundle, operations=["score"]).calibrations
    assert made.exact is not None and len(made.exact.scores) == 32  # 7 of 60 files are left out
    calibrate_bundle(bundle, tmp_path / "new", dark[:100], dark[100:300], "dark")
    copy = InferenceEngine(tmp_path / "new", operations=["score"])
    assert copy.calibration is not None and len(copy.calibration.scores) == 200
    assert copy.store.names == ["default", "night"]


@pytest.mark.parametrize("part, count", [("train", 1), ("test", 0)])
def test_a_folder_of_one_image_is_refused_with_the_number_that_is_needed(
    bundle: Path,
    dark: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    part: str,
    count: int,
) -> None:
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


def test_too_few_held_out_files_of_a_training_folder_are_refused_with_the_reason(
    bundle: Path, tmp_path: Path
) -> None:
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
def test_a_large_folder_or_data_set_is_sampled(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: bool
) -> None:
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
    bundle: Path,
    dark: np.ndarray,
    tmp_path: Path,
    trained_on: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images that a network was trained on calibrate nothing either."""
    monkeypatch.setattr("export.gate.split.MIN_IMAGES", 1)
    photos = tmp_path / "photos"
    for i, image in enumerate(dark.copy()):
        image[0, 0, :2] = divmod(i, 256)  # no two are equal
        (photos / str(i % 7)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(photos / str(i % 7) / f"{i}.png")
    opened = open_bundle(bundle)
    data = {
        "name": "photos",
        "splits": {"train": "photos: 240 files by hash of the file name"},
    }
    if trained_on == "model":
        opened.manifest["data"] = data
    features = data if trained_on == "network of features" else None
    opened.manifest["features"] = {"data": features}
    given = argparse.Namespace(data=str(photos), root=None)
    readers, name = calibrate_command._images(given, opened, features)
    fit, calibration, unseen, trained = map(set, readers)
    said = f"the {trained_on} was trained on photos (recognised by its name): only its parts select"
    assert (said in capsys.readouterr().err) == bool(trained_on)
    bench = argparse.Namespace(in_distribution=str(photos), images=None)
    _, its, copies = ood_bench._id_images(bench, opened, name)
    assert set(copies) == trained
    used, tested = fit | calibration, set(its)
    assert tested and not tested & used and tested == unseen
    assert len(used) + len(tested) + len(trained) == len(dark)
    its = {path.read_bytes() for path in photos.rglob("*.png") if part_of(path.name) == "train"}
    assert trained == (its if trained_on else set()) and not used & trained
    _, its, _ = ood_bench._id_images(bench, opened, "other")
    assert set(its) == tested if trained_on else set(its) > used


def test_copies_do_not_calibrate(tiny_bundle: Path, small_images: np.ndarray) -> None:
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


def test_files_that_were_stored_twice_make_no_band_narrower(
    tiny_bundle: Path, small_images: np.ndarray, tmp_path: Path
) -> None:
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


def test_files_that_were_stored_twice_are_divided_as_others_are(
    tiny_bundle: Path, small_images: np.ndarray
) -> None:
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


def test_grey_images_are_corrupted_as_grey_ones(small_images: np.ndarray) -> None:
    """Colours, which their camera cannot make, would give them away."""
    coloured = small_images[:4]
    grey = np.repeat(coloured[..., :1], 3, axis=3)
    together, alone = corrupted(np.concatenate([coloured, grey])), corrupted(coloured)
    for name, made in corrupted(grey).items():
        assert (made == made[..., :1]).all() and (made != grey).any(), name
        assert (together[name][4:] == together[name][4:, ..., :1]).all(), name
        assert (alone[name] != alone[name][..., :1]).any() and alone[name].shape == coloured.shape


def test_reading_training_images_is_reported(
    tiny_bundle: Path,
    small_images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """There may be many more than those that calibrate or are tested."""
    monkeypatch.setattr("export.gate.images.REPORT_S", -1)
    trained, others = small_images[:3], small_images[100:200]
    told: list[str] = []
    _parts(open_bundle(tiny_bundle), others[:50], others[50:], trained, told.append)
    engine = InferenceEngine(tiny_bundle, device="cpu")
    bench(engine, "inverted", 255 - others, {}, 2, tmp_path, told.append, trained)
    assert told.count("training: read 3 images") == 2


def test_a_picture_that_repeats_is_not_rejected_for_it(
    tiny_bundle: Path, small_images: np.ndarray, tmp_path: Path
) -> None:
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
def test_the_test_part_of_a_data_set_calibrates_nothing(
    tiny_bundle: Path, trained_on: bool
) -> None:
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
    tiny_bundle: Path, small_images: np.ndarray, is_resized: bool, tmp_path: Path
) -> None:
    """As a folder of the same images does."""
    parts = {part: ImageSet(small_images[i::4]) for i, part in enumerate(PARTS)}
    dataset = Dataset("d", parts, {"train": "train[0:60]"}, is_resized=is_resized)
    fit, calibrate, *_ = choose_rows(dataset, open_bundle(tiny_bundle), None, print)
    made = calibrate_bundle(tiny_bundle, tmp_path / "out", fit, calibrate, "d", print)
    assert made.exact is not None and made.resized is not None
    assert (made.exact is made.resized) == is_resized == (made.exact.resize == "fit")


def test_bulk_scoring_by_name(
    bundle: Path,
    night_file: Path,
    dark: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add(bundle, night_file, "night")
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(dark[:30]):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i:02d}.png")
    words = ["score", str(tmp_path / "photos"), "--bundle", str(bundle), "--workers", "1"]
    words += ["--calibration", "night", "--alpha", "0.05"]
    assert main([*words, "--out", str(tmp_path / "scores.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    version = Calibrations.load(night_file).version
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


def test_training_images_do_not_join(bundle: Path, dark: np.ndarray, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, image in zip(files, dark, strict=False):
        Image.fromarray(image).save(file)
    trained = hashlib.sha256(files[1].read_bytes()).hexdigest()[:16]
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["data"] = {**manifest["data"], "sketch": [trained]}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CalibrationError, match=f"were trained on {files[1]}, and probably"):
        give_feedback(bundle, "default", files, [])
    assert not (bundle / "calibrations" / "default.npz").exists()
    assert give_feedback(bundle, "default", files[:1], [files[1]]).joined == 1
    assert give_feedback(bundle, "default", files, [], force=True).joined == 2


def test_feedback_joins_once_and_can_be_taken_back(
    bundle: Path, dark: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for i, image in enumerate(dark[:12]):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(image).save(files[i])
    larger = tmp_path / "larger.png"
    Image.fromarray(dark[20].repeat(2, 0).repeat(2, 1)).save(larger)
    gate = Gate(bundle, alpha=0.05)
    own = gate._engine.calibrations
    assert own.exact is not None and own.resized is not None
    n, n_resized = len(own.exact.scores), len(own.resized.scores)
    before = gate.check(dark[11])[0].p_value
    huge = tmp_path / "huge.png"
    huge.write_bytes(bytes(2**24 + 1))
    done = give_feedback(bundle, "default", [*files, huge, larger, files[0]], [])
    assert (done.joined, done.known, done.before) == (13, 0, own.version)
    assert done.unusable == 1
    after = gate._engine.calibrations
    assert after.version == done.after and after.exact is not None and after.resized is not None
    assert (len(after.exact.scores), len(after.resized.scores)) == (n + 12, n_resized + 1)
    assert after.exact.mixture.means.tolist() == own.exact.mixture.means.tolist()
    p_value = gate.check(dark[11])[0].p_value
    assert before is not None and p_value is not None and p_value > before
    verify_bundle(bundle)
    # The exact ranks: as if the images had been calibration images from the start.
    statistics = gate._engine.statistics(dark[:12])
    scores = own.exact.mixture.negative_log_density(own.exact.normal(own.exact.rows(statistics)))
    assert np.array_equal(np.sort(np.concatenate([own.exact.scores, scores])), after.exact.scores)

    again = give_feedback(bundle, "default", [files[0]], [tmp_path / "1.png"])
    assert (again.joined, again.known, again.removed) == (0, 1, 1)
    back = give_feedback(bundle, "default", [], [*files, larger])
    assert (back.removed, back.rejected) == (12, 1)
    restored = gate._engine.calibrations
    assert restored.exact is not None and not restored.joined
    assert np.array_equal(restored.exact.scores, own.exact.scores)
    assert np.array_equal(restored.exact.reference, own.exact.reference)
    with pytest.raises(CalibrationError, match="is given to accept and to reject"):
        give_feedback(bundle, "default", [files[0]], [files[0]])

    lines = [
        json.loads(x) for x in (bundle / "calibrations/feedback.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 13 + 2 + 13
    assert lines[0]["file"] == str(files[0]) and lines[0]["decision"] == "accept"
    assert len(lines[0]["sha256"]) == 64 and lines[0]["calibration"] == "default"
    changes = [(line["version_before"], line["version_after"]) for line in lines]
    assert [changes[0], changes[13], changes[15]] == [
        (done.before, done.after),
        (again.before, again.after),
        (back.before, back.after),
    ]
    (tmp_path / "junk.png").write_bytes(b"junk")
    words = ["gate", "feedback", str(bundle), "--accept", str(files[3]), str(tmp_path / "junk.png")]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Added to the calibration default: 1. Not usable: 1.\n")
    assert "The gate rejects 0 of the 1 image to be added (alpha 0.01). Of all" in said.err
    assert "junk.png: not an image" in said.err
    assert main([*words[:4], words[-1]]) == 2
    assert "the image cannot be used" in capsys.readouterr().err
    assert main(["gate", "feedback", str(bundle)]) == 2


def test_feedback_that_would_disable_the_gate_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a wrong folder. A few images of any kind may join, but not a few after a few."""
    rng = np.random.default_rng(0)
    for i, pixels in enumerate(rng.integers(0, 2, (20, 8, 8, 3), np.uint8) * 255):
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    files = sorted(tmp_path.glob("*.png"))
    n = 150
    words = ["gate", "feedback", str(bundle), "--accept"]
    assert main([*words, *map(str, files)]) == 2
    said = capsys.readouterr().err
    assert "The gate rejects 20 of the 20 images to be added (alpha 0.01)." in said
    assert "calibration rejects 20 of all accepted images" in said and "option force" in said
    assert "At alphas below 0.12, images like these are no longer rejected." in said  # 21 of 171
    assert not path_of(bundle, "default").exists()
    assert not (bundle / FOLDER / "feedback.jsonl").exists()
    assert give_feedback(bundle, "default", files[:9], []).joined == 9
    lines: list[str] = []
    with pytest.raises(CalibrationError, match="calibration rejects 10 of all accepted images"):
        give_feedback(bundle, "default", files[9:10], [])
    assert give_feedback(bundle, "default", [], files[:9]).removed == 9
    assert give_feedback(bundle, "default", files[:9], [], lines.append).joined == 9
    assert lines[1:] == ["images like these 9 are no longer rejected at alpha 0.01"]
    assert main([*words, *map(str, files), "--force"]) == 0
    read = Calibrations.load(path_of(bundle, "default"))
    assert read.exact is not None and len(read.exact.scores) == n + 20
    assert all(decision.accepted for decision in Gate(bundle).check(files))


def report_on(scores: np.ndarray, new: np.ndarray) -> tuple[str | None, list[str]]:
    """What feedback says of images with new scores that join a calibration with the given ones."""
    former: Any = SimpleNamespace(
        scores=scores,
        joined=None,
        scores_of=lambda statistics: new,
        false_alarm_band=functools.partial(false_alarm_band, len(scores)),
    )
    larger: Any = SimpleNamespace(
        scores=np.sort(np.concatenate([scores, new])), joined=SimpleNamespace(scores=new)
    )
    before: Any = SimpleNamespace(of=lambda resized: former)
    after: Any = SimpleNamespace(of=lambda resized: larger)
    joining: Any = [SimpleNamespace(resized=False, statistics={"bpd": np.zeros(1)})] * len(new)
    lines: list[str] = []
    return _report_unusual(before, after, joining, lines.append), lines


@pytest.mark.parametrize(
    "n, place, count, passing, is_refused",
    [(1000, 5, 9, 5, False), (3000, 21, 16, 8, False), (3000, 25, 20, 16, True)],
)
def test_more_unusual_calibration_images_count_among_those_beyond(
    n: int, place: int, count: int, passing: int, is_refused: bool
) -> None:
    """Images join just below the most unusual ones: the last of them pass soonest."""
    scores = np.arange(n, dtype=float)
    new = n - place - 0.9 + 0.02 * np.arange(count)
    refused, lines = report_on(scores, new)
    assert (refused is not None) == is_refused
    smallest = (1 + place + count) / (n + count + 1)
    assert f"At alphas below {smallest:.2g}, images like these are no longer" in lines[0]
    assert "refused from 30 on, or from 10 on if more than half" in lines[0] or n < 3000
    if is_refused:
        assert f"images like {passing} of these are no longer rejected" in str(refused)
    else:
        assert lines[1:] == [
            f"images like {passing} of these {count} are no longer rejected at alpha 0.01"
        ]


@pytest.mark.parametrize("let_pass", [False, True])
def test_feedback_warns_of_images_that_a_gate_let_pass(let_pass: bool) -> None:
    """They lack the most unusual ones, so that more than alpha would be rejected."""
    rng = np.random.default_rng(0)
    scores = np.sort(rng.normal(size=550))
    new = rng.normal(size=1000)
    if let_pass:
        new = new[new < scores[-5]]  # five of 550 are rejected at alpha 0.01
    _, lines = report_on(scores, new)
    assert any(line.startswith("WARNING: of ") for line in lines) == let_pass


def test_one_outlier_among_the_calibration_images_hides_no_wrong_folder(
    bundle: Path, tmp_path: Path
) -> None:
    """OOD images need not be more unusual than every calibration image: one may lie far beyond."""
    own = InferenceEngine(bundle, device="cpu", operations=["score"]).calibrations
    assert own.exact is not None
    larger = dataclasses.replace(  # 450 images, of which alpha 0.01 rejects four ranks
        own.exact,
        scores=np.append(np.repeat(own.exact.scores, 3)[:-1], 1e9),
        reference=np.repeat(own.exact.reference, 3, axis=0),
        digests=np.empty(0, np.uint64),
    )
    networks = verify_bundle(bundle).networks
    write_calibrations(
        bundle, dataclasses.replace(own, name="camera", model=networks, exact=larger)
    )
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{i}.png" for i in range(12)]
    for file in files:
        Image.fromarray(rng.integers(0, 2, (8, 8, 3), np.uint8) * 255).save(file)
    with pytest.raises(CalibrationError, match="calibration rejects 12 of all accepted images"):
        give_feedback(bundle, "camera", files, [])


def test_feedback_is_taken_back_by_its_values(
    bundle: Path, dark: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another processor, or another version of a library, computes others for the same file."""
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, image in zip(files, dark, strict=False):
        Image.fromarray(image).save(file)
    own = InferenceEngine(bundle, device="cpu", operations=["score"]).calibrations
    give_feedback(bundle, "default", files, [])
    path = path_of(bundle, "default")
    statistics = InferenceEngine.statistics

    def elsewhere(self: InferenceEngine, images: np.ndarray) -> dict[str, np.ndarray]:
        found = statistics(self, images)
        return {**found, "bpd": np.nextafter(found["bpd"], np.float32(9))}

    with monkeypatch.context() as patch:
        patch.setattr(InferenceEngine, "statistics", elsewhere)
        assert give_feedback(bundle, "default", [], files[:1]).removed == 1
        assert give_feedback(bundle, "default", [], files).removed == 1
        restored = Calibrations.load(path)
        assert restored.exact is not None and own.exact is not None
        assert not restored.joined and restored.exact.joined is None
        assert np.array_equal(restored.exact.scores, own.exact.scores)
        assert np.array_equal(restored.exact.reference, own.exact.reference)


def test_an_image_that_calibrates_already_is_not_counted_twice(
    bundle: Path,
    small_images: np.ndarray,
    dark: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calibrating = tmp_path / "calibrating.png"
    Image.fromarray(small_images[200]).save(calibrating)
    assert give_feedback(bundle, "default", [calibrating], []).known == 1
    fitted = tmp_path / "fitted.png"
    Image.fromarray(small_images[0]).save(fitted)
    done = give_feedback(bundle, "default", [fitted, calibrating], [])
    assert (done.joined, done.known, done.fitted) == (0, 1, 1)
    accepted = ["--accept", str(fitted), str(calibrating)]
    assert main(["gate", "feedback", str(bundle), *accepted]) == 0
    said = "Already in it: 1. Not added, because the density was fitted to them: 1."
    assert said in capsys.readouterr().out
    larger = tmp_path / "larger.png"
    Image.fromarray(dark[0].repeat(2, 0).repeat(2, 1)).save(larger)
    files = [tmp_path / "a.png", tmp_path / "a.webp", tmp_path / "a.bmp"]
    for file in files:
        Image.fromarray(dark[0]).save(file, lossless=True)
    assert len({file.read_bytes() for file in files}) == 3
    done = give_feedback(bundle, "default", [*files[:2], larger], [])
    assert (done.joined, done.known) == (2, 0)  # larger images have a calibration of their own
    assert give_feedback(bundle, "default", files[2:], []).known == 1
    with pytest.raises(CalibrationError, match="is given to accept and to reject"):
        give_feedback(bundle, "default", files[:1], files[1:])
    back = give_feedback(bundle, "default", [], [*files[1:], calibrating])
    assert (back.removed, back.rejected) == (1, 1)
    assert len(Calibrations.load(path_of(bundle, "default")).joined) == 1  # the larger one
    # Versions before did not store which images calibrate.
    path = path_of(bundle, "default")
    read = Calibrations.load(path)
    assert read.exact is not None and read.exact.digests.shape == (150,)
    wrong = dataclasses.replace(read.exact, digests=read.exact.digests.astype(float))
    with pytest.raises(CalibrationError, match="digests must be one uint64"):
        wrong.check_values()
    none = np.empty(0, np.uint64)
    former = dataclasses.replace(read.exact, digests=none, fitted_digests=none)
    path.write_bytes(dataclasses.replace(read, exact=former).to_bytes())
    assert give_feedback(bundle, "default", [calibrating, fitted], []).joined == 2
    assert give_feedback(bundle, "default", [calibrating], []).known == 1


def test_a_picture_of_two_sizes_counts_once_where_one_calibration_judges_both(
    bundle: Path, tmp_path: Path
) -> None:
    own = InferenceEngine(bundle, device="cpu", operations=["score"]).calibrations
    assert own.resized is not None
    networks = verify_bundle(bundle).networks
    write_calibrations(bundle, dataclasses.replace(own, exact=own.resized, model=networks))
    assert (read := Calibrations.load(path_of(bundle, "default"))).exact is read.resized
    flat = np.full((8, 8, 3), 9, np.uint8)  # has the same pixels at each size
    files = [tmp_path / f"{scale}.png" for scale in (1, 2)]
    for scale, file in enumerate(files, 1):
        Image.fromarray(flat.repeat(scale, 0).repeat(scale, 1)).save(file)
    with pytest.raises(CalibrationError, match="is given to accept and to reject"):
        give_feedback(bundle, "default", files[:1], files[1:])
    assert give_feedback(bundle, "default", files, []).joined == 1
    assert give_feedback(bundle, "default", files[1:], []).known == 1
    assert give_feedback(bundle, "default", [], files).removed == 1


def test_another_lossless_coder_is_reported_and_joins_nothing(
    bundle: Path,
    night_file: Path,
    dark: np.ndarray,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A changed libwebp shifts a statistic, and with it the verdicts."""
    image = tmp_path / "image.png"
    Image.fromarray(dark[0, :, ::-1]).save(image)
    add(bundle, night_file, "night")
    assert give_feedback(bundle, "night", [image], []).joined == 1
    assert not caplog.records
    path = path_of(bundle, "night")
    made = Calibrations.load(path, "night")
    assert made.webp == coder_version()
    path.write_bytes(dataclasses.replace(made, webp="0.1").to_bytes())
    store = InferenceEngine(bundle, device="cpu", operations=["score"]).store
    store.refresh()
    said = f"night was calibrated with libwebp 0.1, but this is {coder_version()}"
    assert [said in record.message for record in caplog.records] == [True]
    assert store.get("night").exact is not None and not store.broken
    other = tmp_path / "other.png"
    Image.fromarray(dark[1, :, ::-1]).save(other)
    with pytest.raises(CalibrationError, match="cannot join, because .* libwebp 0.1"):
        give_feedback(bundle, "night", [other], [])
    assert give_feedback(bundle, "night", [], [image]).removed == 1
    path.write_bytes(dataclasses.replace(made, webp="").to_bytes())  # of a version before
    assert give_feedback(bundle, "night", [other], []).joined == 1
    # The manifest has it for the bundle's own file of a version before.
    own = open_bundle(bundle)
    about = {**own.manifest["calibration"], "webp": "0.2"}
    calibration = Calibrations.load(bundle / CALIBRATION_NAME)
    (bundle / CALIBRATION_NAME).write_bytes(dataclasses.replace(calibration, webp="").to_bytes())
    write_manifest(bundle, {**own.manifest, "calibration": about})
    caplog.clear()
    assert InferenceEngine(bundle, device="cpu", operations=["score"]).calibrations.webp == "0.2"
    assert ["default was calibrated with libwebp 0.2" in r.message for r in caplog.records] == [
        True
    ]


def test_feedback_that_fails_leaves_the_bundle_as_it_was(
    bundle: Path, dark: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, image = tmp_path / "nope.png", tmp_path / "image.png"
    Image.fromarray(dark[0]).save(image)
    before = sorted(bundle.rglob("*"))
    for words, message in (
        (["--accept", str(missing)], "the image cannot be used"),
        (["--accept", str(image), "--reject", str(image)], "is given to accept and to reject"),
    ):
        assert main(["gate", "feedback", str(bundle), *words]) == 2
        assert message in capsys.readouterr().err
        assert sorted(bundle.rglob("*")) == before


def test_feedback_of_two_processes_at_once_is_of_both(
    bundle: Path, dark: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calibration may change while the images are read, and a crash leaves the audit."""
    mine, others = tmp_path / "mine.png", tmp_path / "others.png"
    for file, pixels in zip((mine, others), dark, strict=False):
        Image.fromarray(pixels).save(file)
    whole = feedback_module._read

    def read(*given: Any) -> Any:
        monkeypatch.undo()
        assert give_feedback(bundle, "default", [others], []).joined == 1
        return whole(*given)

    monkeypatch.setattr(feedback_module, "_read", read)
    assert give_feedback(bundle, "default", [mine], []).joined == 1
    assert len(Calibrations.load(path_of(bundle, "default")).joined) == 2
    monkeypatch.setattr(feedback_module, "write_calibrations", None)
    with pytest.raises(TypeError):
        give_feedback(bundle, "default", [], [mine])
    lines = (bundle / FOLDER / feedback_module.AUDIT).read_text().splitlines()
    assert [json.loads(line)["decision"] for line in lines] == ["accept", "accept", "reject"]


def test_feedback_needs_a_whole_calibration(bundle: Path) -> None:
    (bundle / "calibrations").mkdir()
    (bundle / "calibrations" / "default.npz").write_bytes(b"junk")
    with pytest.raises(CalibrationError, match="is not a calibration"):
        give_feedback(bundle, "default", [], [])
    with pytest.raises(UnknownCalibration, match="there is no calibration 'x'"):
        give_feedback(bundle, "x", [], [])


def test_a_bundle_that_cannot_score_is_reported_as_such(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not as one that ade calibrate could calibrate, and nothing is written into it."""
    write_manifest(bundle, {**open_bundle(bundle).manifest, "operations": ["sample"]})
    images = tmp_path / "images.npy"
    np.save(images, np.zeros((3, 8, 8, 3), np.uint8))
    for words in (
        ["gate", "what-if", str(bundle), "--data", str(images), "--per-day", "10"],
        ["gate", "feedback", str(bundle), "--accept", str(images)],
        ["ood-bench", str(bundle), "--id", str(images), "--out", str(tmp_path / "out")],
    ):
        assert main(words) == 2
        assert "cannot score: it was trained without an inference" in capsys.readouterr().err
    assert not (bundle / FOLDER).exists()


def test_a_wrong_folder_does_not_disable_a_small_calibration(bundle: Path, tmp_path: Path) -> None:
    """At alpha 0.01 it rejects nothing, so that its user has chosen a larger alpha."""
    own = InferenceEngine(bundle, device="cpu", operations=["score"]).calibrations
    assert own.exact is not None
    few = dataclasses.replace(
        own.exact,
        scores=own.exact.scores[::5],
        reference=own.exact.reference[::5],
        digests=np.empty(0, np.uint64),
    )
    assert len(few.scores) == 30
    networks = verify_bundle(bundle).networks
    write_calibrations(bundle, dataclasses.replace(own, name="few", model=networks, exact=few))
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{i}.png" for i in range(40)]
    for file in files:
        Image.fromarray(rng.integers(0, 2, (8, 8, 3), np.uint8) * 255).save(file)
    lines: list[str] = []
    with pytest.raises(CalibrationError, match=r"no longer rejected at alpha 0\.032"):
        give_feedback(bundle, "few", files, [], lines.append)
    assert lines[0].startswith("The gate rejects 40 of the 40 images to be added (alpha 0.032).")
    gate = Gate(bundle, alpha=0.05)
    assert {decision.decision for decision in gate.check(files, "few")} == {"reject"}


def test_feedback_counts_and_records_what_it_was_given(
    bundle: Path,
    small_images: np.ndarray,
    dark: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Images that calibrate stay, copies have lines of their own, a cut line spoils no other."""
    calibrating, fitted, new = (
        tmp_path / f"{name}.png" for name in ("calibrating", "fitted", "new")
    )
    copy = tmp_path / "copy.bmp"
    for file, pixels in (
        (calibrating, small_images[200]),
        (fitted, small_images[0]),
        (new, dark[0]),
        (copy, dark[0]),
    ):
        Image.fromarray(pixels).save(file)
    words = ["gate", "feedback", str(bundle), "--reject", *map(str, (calibrating, fitted, new))]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "ade calibrate used them, so they stay: 2. Rejected, and not added before: 1." in said
    audit = bundle / FOLDER / "feedback.jsonl"
    with (
        full_disk(audit.stat().st_size + 10),
        pytest.raises(OSError, match=r"File too large: '.*/feedback.jsonl'"),
    ):
        give_feedback(bundle, "default", [new, copy, new], [])
    assert give_feedback(bundle, "default", [new, copy, new], []).joined == 1
    lines = audit.read_text().splitlines()
    assert lines[3] == '{"time": "'
    assert [json.loads(line)["file"] for line in lines[4:]] == [str(new), str(copy)]


def test_a_new_calibration_says_that_feedback_is_left_out(
    bundle: Path, small_images: np.ndarray, dark: np.ndarray, tmp_path: Path
) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(dark[0]).save(file)
    lines: list[str] = []
    for feedback in (False, True):
        if feedback:
            give_feedback(bundle, "default", [file], [])
        out = tmp_path / f"out{feedback}"
        fit, others = small_images[:40], small_images[150:200]
        calibrate_bundle(bundle, out, fit, others, "x", lines.append)
        assert any("the images that feedback added" in line for line in lines) is feedback
        assert not path_of(out, "default").exists()


def test_a_calibration_with_feedback_is_not_replaced_unawares(
    bundle: Path, dark: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, image in enumerate(dark[:60]):
        Image.fromarray(image).save(photos / f"{i}.png")
    into = ["calibrate", str(bundle), "--data", str(photos), "--into", str(bundle), "--name"]
    assert main([*into, "night"]) == 0
    assert main([*into, "night"]) == 0  # without feedback, as before
    Image.fromarray(dark[200]).save(tmp_path / "a.png")
    assert give_feedback(bundle, "night", [tmp_path / "a.png"], []).joined == 1
    before = path_of(bundle, "night").read_bytes()
    capsys.readouterr()
    assert main([*into, "night"]) == 2
    said = capsys.readouterr().err
    assert f"{path_of(bundle, 'night')} has 1 image that ade gate feedback added" in said
    assert "give another name, or the option discard-feedback" in said
    assert path_of(bundle, "night").read_bytes() == before

    def fitting() -> Iterator[np.ndarray]:  # feedback comes while the images are read
        assert give_feedback(bundle, "day", [tmp_path / "a.png"], []).joined == 1
        yield from dark[:30]

    assert main([*into, "day"]) == 0
    with pytest.raises(CalibrationError, match="day.npz has 1 image that ade gate feedback added"):
        calibrate_into(bundle, "day", fitting(), dark[30:60], "dark")
    assert main([*into, "night", "--discard-feedback"]) == 0
    assert "discarded 1 image that feedback had added to night" in capsys.readouterr().err
    assert not Calibrations.load(path_of(bundle, "night")).joined
    path_of(bundle, "night").write_bytes(b"damaged")
    assert main([*into, "night"]) == 0
    out = ["calibrate", str(bundle), str(tmp_path / "out"), "--data", str(photos)]
    assert main([*out, "--discard-feedback"]) == 2
    assert "--discard-feedback goes with --into" in capsys.readouterr().err


def test_what_cannot_be_written_is_refused_before_images_are_read(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ade_cli.calibrate._images", None)
    taken = shutil.copytree(bundle, tmp_path / "taken")
    shutil.rmtree(taken / FOLDER, ignore_errors=True)
    (taken / FOLDER).write_text("a file in place of the folder")
    ill = shutil.copytree(bundle, tmp_path / "ill")
    (ill / "score.onnx").write_bytes(b"")
    into = ["--name", "night", "--into"]
    for words, message in (
        ([bundle, *into, taken], f"{taken / FOLDER / 'night.npz'} cannot be written: Not a dir"),
        ([bundle, *into, ill], "score.onnx"),
        ([bundle, *into, tmp_path], "is not a bundle: it has no manifest.json"),
        ([bundle, *into, tmp_path / "gone"], "is not a bundle: the folder does not exist"),
        ([bundle, "/proc/out"], "/proc/out cannot be written: No such file or directory"),
        ([bundle, "/proc/no/out"], "/proc/no/out cannot be written: No such file or directory"),
        ([bundle, ill], "ill exists: calibrate into a new folder"),
        ([ill, tmp_path / "out"], "score.onnx"),
    ):
        assert main(["calibrate", *map(str, words), "--data", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    assert not path_of(bundle, "night").exists() and not (tmp_path / "out").exists()
    monkeypatch.setattr("extensions.gate_reports.verbs.gate.give_feedback", None)
    assert main(["gate", "feedback", str(taken), "--accept", str(tmp_path / "a.png")]) == 2
    message = f"{taken / FOLDER / 'default.npz'} cannot be written: Not a directory"
    assert message in capsys.readouterr().err


def test_null_names_no_calibration(bundle: Path) -> None:
    """As of a tenant who was looked up and not found."""
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    image = base64.b64encode(write_png(np.zeros((8, 8, 3), np.uint8))).decode()
    body = json.dumps({"images": [image], "calibration": None})
    (answer,) = Service("score", engine).answer([RawRequest("application/json", body)])
    assert answer.status == 422 and answer.error is not None
    assert answer.error.code == "bad_parameter"


def test_errors_of_a_calibration_made_by_hand_name_the_file(bundle: Path, tmp_path: Path) -> None:
    own = bundle / CALIBRATION_NAME
    with np.load(own) as arrays:
        whole = dict(arrays)
    for name, array, reason in (
        ("scores", None, "'scores is not a file in the archive'"),
        (
            "scores",
            np.array(1.0),
            r"scores must be finite numbers of shape \(1,\), got \w+ \(\)",
        ),
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
            Calibrations.load(tmp_path / "made.npz")
    np.savez(tmp_path / "made.npz", **{k: v for k, v in whole.items() if k != "scores"})
    with ZipFile(tmp_path / "made.npz", "a") as archive:
        archive.writestr("scores", "no array")
    with pytest.raises(CalibrationError, match="made.npz is not a calibration"):
        Calibrations.load(tmp_path / "made.npz")
    fields = open_bundle(bundle).manifest
    np.savez(own, **{**whole, "scores": np.array(1.0)})
    write_manifest(bundle, fields)
    with pytest.raises(CalibrationError, match=f"{own} is not a calibration: scores must be"):
        InferenceEngine(bundle, device="cpu", operations=["score"])


def test_a_calibration_is_no_bomb(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with np.load(bundle / CALIBRATION_NAME) as arrays:
        whole = dict(arrays)

    def refused(reason: str, compression: int = ZIP_DEFLATED, **changed: np.ndarray) -> None:
        path = tmp_path / "made.npz"
        with ZipFile(path, "w", compression) as archive:
            for name, array in (whole | changed).items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array)
        tracemalloc.start()
        with pytest.raises(CalibrationError, match=reason):
            Calibrations.load(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
        tracemalloc.stop()

    monkeypatch.setattr(file_module, "MAX_CALIBRATION_BYTES", 4 * 2**20)
    refused("at most 4,194,304 bytes, got 3", grid=np.zeros(32 * 2**20, np.uint8))
    refused("must be stored or deflated", ZIP_LZMA)
    refused("at most 1000 arrays, got 10", **{f"x{i}": np.array(0) for i in range(1000)})
    # Such arrays take no bytes, and a loop over them lasts for hours.
    refused(r"names must be at most 1000, got \(1000000000, 0\)", names=np.empty((10**9, 0)))
    refused("joined_files must be SHA-256", joined_files=np.empty((10**9, 0)))


def test_text_of_a_calibration_controls_no_terminal_and_no_log(
    bundle: Path, tmp_path: Path
) -> None:
    evil = "0\x1b]52;c;eA==\x07\n2025-01-01 ERROR forged"
    with np.load(bundle / CALIBRATION_NAME) as arrays:
        whole = dict(arrays)
    names = whole["names"].tolist()
    for name, value in (
        *((name, evil) for name in ("webp", "model", "estimator", "resize")),
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
            Calibrations.load(tmp_path / "made.npz")
        message = str(refused.value).removeprefix(str(tmp_path))
        assert message.isprintable() and len(message) < 300


def test_a_damaged_name_of_an_array_hides_no_calibration(bundle: Path) -> None:
    """Without the second one, the first would judge resized images."""
    own = InferenceEngine(bundle, device="cpu", operations=["score"]).calibrations
    assert own.exact is not None and own.resized is not None
    any_size = dataclasses.replace(own.exact, resize="fit")
    content = bytearray(dataclasses.replace(own, exact=any_size).to_bytes())
    path = bundle / "x.npz"
    path.write_bytes(content)
    assert Calibrations.load(path).resized is not Calibrations.load(path).exact
    for name in (b"resized_scores.npy", b"webp.npy", b"digests.npy"):
        damaged = content.copy()
        damaged[content.rfind(b"PK\x01\x02", 0, content.rfind(name)) + 46] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CalibrationError, match="damaged"):
            Calibrations.load(path)
