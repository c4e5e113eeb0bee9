"""Verbs that need no service: scoring a folder, also after interruptions, and single files."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from ade_base.files import image_paths, only_writer
from ade_base.pictures.decoders import DecoderError
from ade_base.pictures.read import MAX_FILE_BYTES
from ade_base.pictures.show import write_png
from ade_cli.commands import command
from ade_cli.data_options import say
from ade_cli.main import main
from ade_cli.score import NO_VERDICT, resumed
from export.gate.calibrate import calibrate_bundle
from export.gate.images import readable
from serving import bulk
from serving.api.score_table import columns
from serving.bulk import BulkError, BulkOptions, FileScorer, score_folder
from serving.engine.bundle import open_bundle
from serving.engine.engine import InferenceEngine
from serving.page.files import write_file
from serving.page.models import Models
from serving.page.runs import Runs
from serving.page.uploads import safe_name
from serving.verdict.calibration_file import CalibrationPair
from tests.helpers import (
    ROOT,
    full_disk,
    held_by_another,
    make_folder,
    make_traps,
    with_calibrations,
)
from tests.in_process import answered_here, page_function
from training.data import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_images):
    """300 images in three folders, two broken files, an image of another size and a text file."""
    return make_folder(tmp_path_factory.mktemp("images"), small_images)


def scorer(bundle, **options):
    return FileScorer(open_bundle(bundle), None, BulkOptions(**options))


def score(bundle, folder, out, **options):
    return score_folder(scorer(bundle, **options), folder, out, 1, lambda done, total: None)


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def test_every_file_has_its_row_in_every_format(tiny_bundle, folder, tmp_path):
    tables = {}
    for suffix in bulk.FORMATS:
        summary = score(tiny_bundle, folder, tmp_path / f"scores{suffix}", alpha=0.1)
        assert summary.scored == 300 and summary.errors == 3
        tables[suffix] = read(tmp_path / f"scores{suffix}")
        assert not (tmp_path / f"scores{suffix}.part").exists()
    rows = tables[".jsonl"]
    assert [row["path"] for row in rows] == list(image_paths(folder)) and len(rows) == 303
    by_path = {row["path"]: row for row in rows}
    assert by_path["broken.png"]["error"] == by_path["empty.jpg"]["error"] == "not_an_image"
    assert by_path["wide.png"]["error"] == "wrong_size" and "8 x 8" in by_path["wide.png"]["notes"]
    engine = InferenceEngine(tiny_bundle, device="cpu")
    good = [row for row in rows if not row["error"]][:40]
    images = np.stack([np.asarray(Image.open(folder / row["path"])) for row in good])
    for row, direct in zip(good, engine.score(images), strict=True):
        assert row["bpd"] == direct.bpd and row["p_value"] == direct.verdict.p_value
        assert row["ood"] == (direct.verdict.p_value <= 0.1)
        assert row["distortion"] == direct.parts["distortion"]
        assert row["decision"] == ("reject" if row["ood"] else "accept")
        assert row["decision_reason"] is None
    assert sum(row["ood"] or False for row in rows) == summary.rejected > 0
    assert summary.accepted == 300 - summary.rejected and summary.no_verdict == 0
    assert by_path["wide.png"]["decision"] == "no_verdict"
    assert by_path["wide.png"]["decision_reason"] == "not_scored: wrong_size"
    assert tables[".parquet"] == rows
    assert [float(row["bpd"]) if row["bpd"] else None for row in tables[".csv"]] == [
        row["bpd"] for row in rows
    ]


def test_names_of_files_do_not_control_the_terminal(tiny_bundle, tmp_path, capsys):
    images, bundle = tmp_path / "images", str(tiny_bundle)
    images.mkdir()
    (images / "a\x1b[2J\u202eb.png").write_bytes(b"broken")
    (images / "c\x1b[2J").symlink_to(tmp_path)
    words = ["reconstruct", str(images), "--bundle", bundle, "--out", str(tmp_path / "out")]
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(r"\x1b[2J" in line for line in lines) == 2
    assert all(line.isprintable() for line in lines)


def test_the_page_writes_the_same_table(tiny_bundle, folder, tmp_path, monkeypatch):
    """Only notes on errors differ, which name the page's own options; the order differs, too."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "page-files"))
    names = ["broken.png", "wide.png", *(name for name in image_paths(folder) if "/" in name)][:12]
    images, given = tmp_path / "images", []
    images.mkdir()
    for i, name in enumerate(names):
        path = images / f"={i}.png"
        path.write_bytes((folder / name).read_bytes())
        given.append(write_file(path.read_bytes(), safe_name(path.name)))
    score(tiny_bundle, images, tmp_path / "scores.csv", alpha=0.1)
    with answered_here({"tiny": tiny_bundle}) as url:
        score_many = page_function(Models(url, [open_bundle(tiny_bundle)], None), "score_many")
        *_, download = score_many("tiny", given, None, 0.1, False, 0.1, Runs())
    theirs, own = read(tmp_path / "scores.csv"), read(Path(download.value["path"]))
    assert list(own[0]) == list(theirs[0]) == columns(open_bundle(tiny_bundle), samples=1)
    for table in (theirs, own):
        for row in table:
            assert bool(row.pop("notes")) is (row["decision"] == "no_verdict")
        table.sort(key=lambda row: row["path"])
    assert own == theirs and {row["error"] for row in own} == {"", "not_an_image", "wrong_size"}
    assert {row["decision"] for row in own} >= {"accept", "no_verdict"}


def test_a_spreadsheet_runs_no_file_name(tiny_bundle, small_images, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    names = ["=1+1.png", "+1.png", "-1.png", "@a.png", "\ta.png", "\ra.png"]
    for name in names:
        Image.fromarray(small_images[0]).save(folder / name)
    for suffix, mark in ((".csv", "'"), (".jsonl", ""), (".parquet", "")):
        score(tiny_bundle, folder, tmp_path / f"scores{suffix}")
        rows = read(tmp_path / f"scores{suffix}")
        assert [row["path"] for row in rows] == [mark + name for name in sorted(names)]
        assert any(
            float(row[part]) < 0
            for row in rows
            for part in columns(open_bundle(tiny_bundle), samples=1)[2:8]
        )


def test_only_regular_files_are_read(tiny_bundle, small_images, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(small_images[0]).save(folder / "good.png")
    reasons = make_traps(folder)
    score(tiny_bundle, folder, tmp_path / "scores.jsonl")
    rows = {row["path"]: row for row in read(tmp_path / "scores.jsonl")}
    assert rows.pop("good.png")["bpd"] > 0
    assert {path: row["notes"] for path, row in rows.items()} == reasons
    assert {row["error"] for row in rows.values()} == {"unreadable", "too_large"}
    assert main(["score", str(folder / "pipe.png"), "--bundle", str(tiny_bundle)]) == 2
    assert "not a regular file" in capsys.readouterr().out
    # From ade calibrate.
    assert list(readable(sorted(folder.iterdir()), say)) == [(folder / "good.png").read_bytes()]
    said = capsys.readouterr().err
    assert all(f"{folder / name}: {why}" in said for name, why in reasons.items())


def test_a_few_of_the_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    """An outage of the storage leaves out no files: an error ends the command."""
    lines: list[str] = []
    for i in range(10):
        with open(tmp_path / f"{i}.png", "wb") as file:
            file.truncate(MAX_FILE_BYTES + 1)
    assert not [*readable(sorted(tmp_path.iterdir()), lines.append)]
    assert lines[0].startswith("files: left out 10 images: ") and lines[0].count(".png") == 5
    failed = mock.Mock(side_effect=OSError(errno.ESTALE, os.strerror(errno.ESTALE)))
    monkeypatch.setattr("export.gate.images.read_file", failed)
    assert not [*readable([tmp_path / f"{i}.png" for i in range(5)], lines.append)]
    with pytest.raises(DataError, match=r"6 of 6 files cannot be .*: Stale file handle"):
        [*readable([tmp_path / f"{i}.png" for i in range(6)], lines.append)]


def test_resized_images_without_their_calibration_have_no_verdict(tiny_bundle, tmp_path, capsys):
    with_calibrations(tiny_bundle, tmp_path / "exact", lambda both: CalibrationPair(both.exact))
    (tmp_path / "one").mkdir()
    Image.new("RGB", (40, 20), (9, 90, 200)).save(tmp_path / "one" / "wide.webp")
    arguments = ["score", str(tmp_path / "one"), "--bundle", str(tmp_path / "exact")]
    arguments += ["--resize", "fit", "--samples", "3"]
    assert main([*arguments, "--out", str(tmp_path / "a.jsonl")]) == NO_VERDICT
    said = capsys.readouterr()
    assert "1 without a verdict, 0 rejected, 0 accepted" in said.out
    assert "would be rejected" not in said.out
    assert "warning: no image got a verdict, so none is accepted" in said.err
    (row,) = read(tmp_path / "a.jsonl")
    assert row["bpd"] > 0 and row["iwae_gap"] <= 0 and row["p_value"] is None
    assert "resized from 40 x 20" in row["notes"]
    assert row["decision"] == "no_verdict"
    assert row["decision_reason"].startswith("resized_not_calibrated: ")
    assert main([*arguments[:1], str(tmp_path / "one" / "wide.webp"), *arguments[2:]]) == NO_VERDICT
    assert "resized_not_calibrated" in capsys.readouterr().err


def test_images_of_any_size_calibrate_both_paths_at_once(
    tiny_bundle, tmp_path, small_images, capsys
):
    larger = [np.repeat(image, 2, 0).repeat(2, 1) for image in small_images]
    calibrate_bundle(tiny_bundle, tmp_path / "any", larger[:100], larger[100:200], "corners")
    manifest = open_bundle(tmp_path / "any").manifest["calibration"]
    assert manifest["resize"] == manifest["resized"]["resize"] == "fit"
    assert manifest["images"] == 100
    Image.new("RGB", (40, 20), (9, 90, 200)).save(tmp_path / "wide.png")
    arguments = ["score", str(tmp_path / "wide.png"), "--bundle", str(tmp_path / "any")]
    arguments += ["--alpha", "0.1"]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "warning: this bundle was calibrated on images of any size" in said.err
    assert "wrong_size" in said.out
    assert main([*arguments, "--resize", "fit"]) == 0
    said = capsys.readouterr()
    assert "warning" not in said.err and 0 < json.loads(said.out)["p_value"] <= 1


def test_an_interrupted_table_is_resumed_without_gaps_or_duplicates(
    tiny_bundle, folder, tmp_path, monkeypatch
):
    score(tiny_bundle, folder, tmp_path / "whole.jsonl")
    out = tmp_path / "scores.jsonl"

    def stop(done, total):
        if done >= 128:
            raise RuntimeError("the power went out")

    with pytest.raises(RuntimeError):
        score_folder(scorer(tiny_bundle), folder, out, 1, stop)
    part = tmp_path / "scores.jsonl.part"
    whole = part.read_bytes()
    part.write_bytes(whole + b'{"path": "cla')  # a line that was being written
    options = r"started with \{'alpha': 0.01\}, this call has \{'alpha': 0.2\}:"
    with pytest.raises(BulkError, match=options):
        score(tiny_bundle, folder, out, alpha=0.2)
    refused = pytest.raises(BulkError, match="is being written by another process")
    with held_by_another(tmp_path / ".scores.jsonl.ade-lock"), refused:
        score(tiny_bundle, folder, out)
    seen = []
    score_folder(scorer(tiny_bundle), folder, out, 1, lambda done, total: seen.append(done))
    assert seen[0] == 128 and seen[-1] == 303
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text() and not part.exists()
    with pytest.raises(BulkError, match="exists already"):
        score(tiny_bundle, folder, out)
    out.unlink()
    lines = whole.splitlines(keepends=True)
    for damaged in (b"junk\n", b"5\n", lines[2][:20] + lines[3], b'{"path": "class0/0001.png"}\n'):
        part.write_bytes(b"".join([*lines[:2], damaged, *lines[3:]]))
        with pytest.raises(BulkError, match=r"part: line 3 is damaged: remove the file"):
            score(tiny_bundle, folder, out)
    part.write_bytes(whole)
    # An earlier file is replaced by another: as many, and the last one is the same.
    paths = [*bulk.image_paths(folder)]
    monkeypatch.setattr(bulk, "image_paths", lambda folder: iter([*paths[:9], "x", *paths[10:]]))
    with pytest.raises(BulkError, match="has changed since .* its file 10 is x"):
        score(tiny_bundle, folder, out)


def test_ctrl_c_reaches_the_program_alone_and_leaves_no_process(
    tiny_bundle, folder, tmp_path, monkeypatch
):
    def interrupt(done, total):
        if done:
            (worker,) = multiprocessing.active_children()
            status = Path(f"/proc/{worker.pid}/status").read_text()
            (blocked,) = (line for line in status.splitlines() if line.startswith("SigBlk"))
            assert int(blocked.split()[1], 16) & 1 << (signal.SIGINT - 1)
            raise KeyboardInterrupt

    def again(pool, *args, **options):
        signal.raise_signal(signal.SIGINT)
        shutdown(pool, *args, **options)

    shutdown = ProcessPoolExecutor.shutdown
    monkeypatch.setattr(ProcessPoolExecutor, "shutdown", again)
    with pytest.raises(KeyboardInterrupt):
        score_folder(scorer(tiny_bundle), folder, tmp_path / "s.csv", 1, interrupt)
    assert not multiprocessing.active_children()


def test_a_storage_that_fails_ends_the_run_instead_of_giving_rows(tiny_bundle, folder, monkeypatch):
    """Rows are final: the errors of an expired login would be those of all files that follow."""
    monkeypatch.setattr(bulk, "RETRY_S", 0.0)
    paths = [path for path in image_paths(folder) if path.startswith("class")][:4]
    answers: dict[str, list[Exception | None]] = {}

    def read_here(path):
        error = answers[path].pop() if answers.get(path) else None
        if error is not None:
            raise error
        return (folder / path).read_bytes()

    scores = FileScorer(open_bundle(tiny_bundle), None, BulkOptions(), read_here)
    lost, gone = OSError(errno.EIO, "I/O error"), FileNotFoundError("No such file")
    answers[paths[1]], answers[paths[2]] = [lost], [gone]
    rows = scores(paths)
    assert [row["error"] for row in rows if "error" in row] == ["unreadable"]
    assert rows[2]["notes"] == "No such file" and "bpd" in rows[1]
    answers[paths[1]] = [lost] * 2  # a damaged file, since the others can be read
    assert [row.get("error") for row in scores(paths)] == [None, "unreadable", None, None]
    for path in paths:
        answers[path] = [PermissionError("expired")] * 5
    with pytest.raises(BulkError, match=f"{paths[0]}: expired, and no other file can be read"):
        scores(paths)
    for path in paths:  # as after the mount was lost, also between both attempts
        answers[path] = [gone] * 4 + [lost]
    with pytest.raises(BulkError, match="No such file, and no other file can be read"):
        scores(paths)
    answers.clear()
    assert not any("error" in row for row in scores(paths))
    answers |= {paths[0]: [gone, None], paths[1]: [gone]}  # in the middle of a chunk
    with pytest.raises(BulkError, match="No such file, and no other file can be read"):
        scores(paths[:2])


def test_lasting_errors_of_a_first_chunk_are_those_of_its_files(tiny_bundle, folder, monkeypatch):
    """Others can be read: of the folder, or in the chunk, of another size than the model's."""
    monkeypatch.setattr(bulk, "RETRY_S", 0.0)
    damaged = next(path for path in image_paths(folder) if path.startswith("class"))

    def scores(of, others):
        def read_here(path):
            content = OSError(errno.EIO, "I/O error") if path == damaged else others.get(path)
            if isinstance(content, OSError):
                raise content
            return (folder / path).read_bytes() if content is None else content

        made = FileScorer(open_bundle(tiny_bundle), of, BulkOptions(), read_here)
        return [row.get("error") for row in made([damaged, *others])]

    assert scores(folder, {}) == ["unreadable"]
    large = io.BytesIO()
    Image.new("RGB", (20, 20)).save(large, "PNG")
    assert scores(None, {"large.png": large.getvalue()}) == ["unreadable", "wrong_size"]
    empty = {"empty.png": b"", "huge.png": OSError(errno.EFBIG, "File too large")}
    assert scores(folder, empty) == ["unreadable", "not_an_image", "too_large"]
    for gone in (None, folder / "gone"):
        with pytest.raises(BulkError, match="no other file can be read"):
            scores(gone, {})


def test_files_to_try_are_spread_over_the_folder(tiny_bundle, folder):
    """Those of its first subfolders may all be broken links, and one that was read be moved."""
    paths = list(image_paths(folder))
    gone = {path for path in paths if not path.startswith("class2")}

    def read_here(path):
        if path in gone:
            raise FileNotFoundError(errno.ENOENT, "No such file")
        return (folder / path).read_bytes()

    scores = FileScorer(open_bundle(tiny_bundle), folder, BulkOptions(), read_here)
    assert {row.get("error") for row in scores(paths[:64])} == {"unreadable"}
    assert "error" not in scores(paths[-1:])[0]
    gone |= {*paths[-2:]}
    assert scores(paths[-2:-1])[0]["error"] == "unreadable"


def test_broken_links_are_rows_however_many(tiny_bundle, small_images, tmp_path):
    """A checkout of which few files were fetched is not a storage that is lost."""
    names = [f"{i:03}.png" for i in range(100)]
    for name in names[:-1]:
        (tmp_path / name).symlink_to("nowhere")
    (tmp_path / names[-1]).write_bytes(write_png(small_images[0]))
    rows = FileScorer(open_bundle(tiny_bundle), tmp_path, BulkOptions())
    found = [row.get("error") for row in rows(names[:64])]
    assert found == ["unreadable"] * 64


def test_all_processes_must_score_with_one_bundle(tiny_bundle, tmp_path, small_images):
    other = tmp_path / "other"
    shutil.copytree(tiny_bundle, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "licence": "another"}))
    versions = scorer(tiny_bundle).versions
    with pytest.raises(BulkError, match="other is another bundle here than where scoring began"):
        FileScorer(open_bundle(other), None, BulkOptions(), like=versions)
    assert FileScorer(open_bundle(tiny_bundle), None, BulkOptions(), like=versions)


def test_other_files_with_names_like_its_own_are_kept(tiny_bundle, folder, tmp_path):
    for theirs in ("a note without a line's end", "a note\n"):
        (tmp_path / "scores.jsonl.part").write_text(theirs)
        with pytest.raises(BulkError, match="was started with something else"):
            score(tiny_bundle, folder, tmp_path / "scores.jsonl")
        assert (tmp_path / "scores.jsonl.part").read_text() == theirs
    (tmp_path / "poetry.lock").write_text("precious")
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path / "poetry", BulkError):
        raise ZeroDivisionError
    assert (tmp_path / "poetry.lock").read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_kill_leaves_a_resumable_file_and_no_process(tiny_bundle, folder, tmp_path):
    folder = Path(shutil.copytree(folder, tmp_path / "images"))
    out = tmp_path / "scores.csv"
    words = ["score", folder, "--bundle", tiny_bundle, "--out", out, "--workers", 2]
    command = [sys.executable, "-m", "ade_cli.main", *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    part = tmp_path / "scores.csv.part"
    try:
        deadline = time.monotonic() + 60
        while not (part.exists() and part.read_bytes().count(b"\n") > 64):
            assert time.monotonic() < deadline and not out.exists()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for _ in range(100):
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("workers outlived the program")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # What has a row is not scored again.
    (written,) = (line for line in part.read_text().splitlines() if "class0/0003.png" in line)
    (folder / "class0" / "0003.png").write_bytes(b"not an image any more")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 without a verdict, " in done.stdout
    assert "at alpha 0.01; 3 could not be scored" in done.stdout
    rows = {row["path"]: row for row in read(out)}
    assert list(rows) == list(image_paths(folder))
    assert float(rows["class0/0003.png"]["bpd"]) == json.loads(written)["bpd"]


def test_a_table_that_another_process_finished_is_kept(tiny_bundle, folder, tmp_path, monkeypatch):
    out = tmp_path / "scores.csv"

    def paths(folder):
        out.write_text("theirs")
        return image_paths(folder)

    monkeypatch.setattr("serving.bulk.image_paths", paths)
    with pytest.raises(BulkError, match="exists already"):
        score(tiny_bundle, folder, out)
    assert out.read_text() == "theirs" and list(tmp_path.glob("*.part")) == []


def test_a_full_disk_is_named_and_the_same_command_resumes(tiny_bundle, folder, tmp_path, capsys):
    out = tmp_path / "scores.csv"
    command = ["score", str(folder), "--bundle", str(tiny_bundle), "--out", str(out)]
    with full_disk(50_000):
        assert main([*command, "--workers", "1"]) == 2
    assert f"ade score: {out}: File too large" in capsys.readouterr().err
    assert main(command) == 0
    assert len(read(out)) == 303


def test_more_processes_than_a_semaphore_can_count(tiny_bundle, folder, tmp_path):
    out = tmp_path / "scores.csv"
    command = ["score", str(folder), "--bundle", str(tiny_bundle), "--out", str(out)]
    assert main([*command, "--workers", str(2**31)]) == 0


def test_the_cause_of_a_failing_worker_is_reported(tiny_bundle, folder, tmp_path, monkeypatch):
    """A calibration that was changed before the workers opened it is not a lack of memory."""
    before = scorer(tiny_bundle)
    before.calibrations = dataclasses.replace(before.calibrations, version="1")
    with pytest.raises(BulkError, match="^the calibration default was changed meanwhile$"):
        score_folder(before, folder, tmp_path / "scores.csv", 1, lambda done, total: None)


def test_without_room_for_a_decoder_a_command_ends_with_one_line(
    tiny_bundle, tmp_path, monkeypatch, capsys
):
    """The file is not to blame: a table has no row for it, and the command is repeated later."""
    exif = Image.Exif()
    exif[0x0112] = 1  # such a file is decoded in another process
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    monkeypatch.setattr("ade_base.pictures.decoders._idle", [])
    monkeypatch.setattr("ade_base.pictures.decoders.START_SECONDS", 0.001)
    assert main(["score", str(tmp_path / "a.jpg"), "--bundle", str(tiny_bundle)]) == 2
    said = capsys.readouterr().err
    assert "the process that decodes images did not start" in said and "Traceback" not in said
    failed: Future[list[dict[str, Any]]] = Future()
    failed.set_exception(DecoderError("the process that decodes images did not start"))
    with pytest.raises(BulkError, match="did not start: the same command resumes here"):
        bulk._result(failed)


def test_files_one_by_one(tiny_bundle, folder, tmp_path, capsys):
    engine, files = InferenceEngine(tiny_bundle, device="cpu"), list(image_paths(folder))[3:6]
    given = [str(folder / file) for file in files]
    pixels = np.stack([np.asarray(Image.open(file)) for file in given])

    def ade(*words, out=None):
        where = [] if out is None else ["--out", str(tmp_path / out)]
        assert main([*words, "--bundle", str(tiny_bundle), *where]) == 0
        return tmp_path / str(out)

    ade("score", *given, str(folder / "wide.png"))
    *rows, wide = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert len(rows) == 3 and all("bpd" in row for row in rows) and wide["error"] == "wrong_size"
    samples = np.load(ade("sample", "--n", "4", "--seed", "7", out="s.npy"))
    assert np.array_equal(samples, engine.sample([7] * 4, range(4)))
    with Image.open(ade("sample", "--n", "4", out="s.png")) as grid:
        assert grid.info["ade:n"] == "4"
    with np.load(ade("encode", *given, out="z.npz")) as arrays:
        assert np.array_equal(arrays["z_0"], engine.encode(pixels)[0].z)
        assert arrays["path"].tolist() == given
    class0 = folder / "class0"
    with np.load(ade("encode", given[0], str(class0), out="all.npz")) as arrays:
        inside = [str(class0 / path) for path in image_paths(class0)]
        assert arrays["path"].tolist() == [given[0], *inside]
        assert len(arrays["z_0"]) == 1 + len(inside) > 2
    made = ade("reconstruct", *given, out="made")
    found = [np.asarray(Image.open(made / f"{Path(file).stem}.png")) for file in files]
    assert np.array_equal(found, engine.reconstruct(pixels))
    assert "dB" in capsys.readouterr().out


def test_files_that_cannot_be_used_are_named_and_left_out(
    tiny_bundle, small_images, tmp_path, monkeypatch, capsys
):
    folder = make_folder(tmp_path / "images", small_images[:4])
    reasons = {**make_traps(folder), "wide.png": "images must be 8 x 8 pixels, got 40 x 20; "}
    words = [str(folder), "--bundle", str(tiny_bundle), "--out"]
    good = sorted(str(path) for path in folder.glob("class*/*"))
    assert main(["encode", *words, str(tmp_path / "all.npz")]) == 0
    captured = capsys.readouterr()
    assert all(f"left out {folder / name}: {why}" in captured.err for name, why in reasons.items())
    assert captured.err.count("left out") == len(reasons) + 2 and "--resize fit" in captured.err
    with np.load(tmp_path / "all.npz") as arrays:
        assert arrays["path"].tolist() == good and len(arrays["z_0"]) == 4
        assert f"z_0 {arrays['z_0'].shape}" in captured.out
    assert main(["reconstruct", *words, str(tmp_path / "made")]) == 0
    captured = capsys.readouterr()
    assert all(f"left out {folder / name}: {why}" in captured.err for name, why in reasons.items())
    made = sorted((tmp_path / "made").glob("*/*"))
    assert [path.relative_to(tmp_path / "made") for path in made] == [
        Path(path).relative_to(folder) for path in good
    ]

    encode = InferenceEngine.encode

    def without_first(self, images, seeds):
        levels = encode(self, images, seeds)
        levels[0].z[0] = np.nan
        return levels

    monkeypatch.setattr(InferenceEngine, "encode", without_first)
    assert main(["encode", *words, str(tmp_path / "finite.npz")]) == 0
    said = capsys.readouterr().err
    assert f"left out {good[0]}: its latents are not finite numbers" in said
    with np.load(tmp_path / "finite.npz") as arrays:
        assert arrays["path"].tolist() == good[1:] and np.isfinite(arrays["z_0"]).all()
    assert main(["encode", good[0], *words[1:], str(tmp_path / "none.npz")]) == 2
    assert "no image could be used" in capsys.readouterr().err
    assert not (tmp_path / "none.npz").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["score", "FOLDER", "--bundle", "BUNDLE"], "need --out FILE"),
        (["score", "FOLDER", "--bundle", "BUNDLE", "--out", "x.txt"], "the name must end with"),
        (
            ["score", "FOLDER", "--bundle", "BUNDLE", "--out", "x.csv", "--alpha", "2"],
            "--alpha must be above 0 and at most 1, got 2.0",
        ),
        (["score", "FOLDER", "--bundle", "EMPTY", "--out", "x.txt"], "the name must end with"),
        (
            ["score", "FILE", "--bundle", "BUNDLE", "--out", "x.csv"],
            "--out is for the scores of one folder",
        ),
        (["score", "EMPTY", "--bundle", "BUNDLE", "--out", "x.csv"], "holds no images"),
        (
            ["score", "FOLDER", "--bundle", "BUNDLE", "--out", "x.csv", "--workers", "0"],
            "--workers must be at least 1, got 0",
        ),
        (
            ["sample", "--bundle", "BUNDLE", "--n", "0", "--out", "x.png"],
            "--n must be from 1 to 256",
        ),
        (["sample", "--bundle", "BUNDLE", "--out", "x.jpg"], "must end with .png or .npy"),
        (["sample", "--bundle", "BUNDLE", "--out", "folder.png"], "folder.png: Is a directory"),
        (["score", "MISSING", "WIDE", "--bundle", "BUNDLE"], "no image could be scored"),
        (["encode", "EMPTY", "--bundle", "BUNDLE", "--out", "x.npz"], "empty holds no images"),
        (
            ["encode", "FILE", "--bundle", "BUNDLE", "--out", "folder.npz"],
            "folder.npz exists already",
        ),
        (["reconstruct", "FILE", "--bundle", "EMPTY", "--out", "/proc/x"], "/proc/x cannot be wri"),
        (
            ["encode", "WIDE", "--bundle", "BUNDLE", "--out", "x.npz"],
            "wide.png: images must be 8 x 8 pixels",
        ),
        (
            ["reconstruct", "MISSING", "--bundle", "BUNDLE", "--out", "x"],
            "missing.png: No such file",
        ),
        (["reconstruct", "FILE", "FILE", "--bundle", "BUNDLE", "--out", "x"], "0000.png and "),
        (["reconstruct", "FOLDER", "--bundle", "BUNDLE", "--out", "INSIDE"], "must lie outside of"),
        (["reconstruct", "FILE", "--bundle", "EMPTY", "--out", "TEXT"], "readme.txt is a file"),
        (["score", "FOLDER", "--bundle", "EMPTY", "--out", "TABLE"], "exists already: delete it"),
        (["score", "FILE", "--bundle", "MANIFEST"], "manifest.json is not a bundle but a file"),
        (["encode", "FILE", "--bundle", "EMPTY", "--out", "x.npz"], "manifest"),
        (["serve", "BUNDLE", "--cuda-graphs", "--device", "cpu"], "--cuda-graphs needs --device"),
        (
            ["serve", "BUNDLE", "--cuda-graphs", "--backend", "torchscript"],
            "and --backend onnxruntime, got --device auto and --backend torchscript",
        ),
    ],
)
def test_errors_name_the_cause(
    arguments, message, tiny_bundle, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.npz").mkdir()
    names = {
        "FOLDER": folder,
        "BUNDLE": tiny_bundle,
        "EMPTY": tmp_path / "empty",
        "WIDE": folder / "wide.png",
        "MISSING": folder / "missing.png",
        "FILE": folder / "class0" / next(image_paths(folder / "class0")),
        "INSIDE": folder / "out",
        "TEXT": tmp_path / "readme.txt",
        "TABLE": tmp_path / "table.csv",
        "MANIFEST": tiny_bundle / "manifest.json",
    }
    names["TEXT"].touch()
    names["TABLE"].touch()
    assert main([str(names.get(argument, argument)) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and "img/s" not in said
    assert not list(tmp_path.glob("x*")) and not (folder / "out").exists()


@pytest.mark.parametrize("suffix", bulk.FORMATS)
def test_no_table_is_left_if_nothing_could_be_scored(suffix, tiny_bundle, tmp_path, capsys):
    """So that the corrected command can write it."""
    photos, out = tmp_path / "photos", tmp_path / f"scores{suffix}"
    photos.mkdir()
    for name in "ab":
        Image.new("RGB", (16, 12)).save(photos / f"{name}.png")
    (photos / "c.png").write_bytes(b"junk")
    given = ["score", str(photos), "--bundle", str(tiny_bundle), "--out", str(out)]
    given += ["--workers", "1"]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert "no image could be scored" in said and "of 2 of 3 files: images must be 8 x 8" in said
    assert "--resize fit" in said and not list(tmp_path.glob("scores*"))
    main([*given, "--resize", "fit"])
    assert len(read(out)) == 3 and "img/s" in capsys.readouterr().err


def test_pictures_of_a_folder_keep_its_subfolders(tiny_bundle, folder, tmp_path, capsys):
    """Class folders often number their files alike."""
    classes = tmp_path / "classes"
    for name in ("cats", "dogs/small"):
        (classes / name).mkdir(parents=True)
        shutil.copy(folder / "class0" / "0000.png", classes / name / "1.png")
    made = tmp_path / "made"
    words = [str(classes), "--bundle", str(tiny_bundle), "--out", str(made)]
    assert main(["reconstruct", *words]) == 0
    found = sorted(str(path.relative_to(made)) for path in made.rglob("*.png"))
    assert found == ["cats/1.png", "dogs/small/1.png"]
    shutil.copy(classes / "cats" / "1.png", classes / "cats" / "1.bmp")
    assert main(["reconstruct", *words]) == 2
    assert "must have different names" in capsys.readouterr().err


def test_originals_are_never_overwritten(tiny_bundle, folder, tmp_path, capsys):
    """Neither those of the command, nor others of their names where its files would go."""
    content = (folder / "class0" / "0000.png").read_bytes()
    inside = f"sorted/{tmp_path.name}/a.png"  # of a folder whose names would lead back here
    mine, *_ = paths = [
        tmp_path / one for one in ("a.png", "b.png", "other/b.png", inside, "z.npz")
    ]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    Image.open(mine).save(tmp_path / "a.bmp")  # its picture would be named like the one above
    for verb, given, out, said in (
        ("reconstruct", ["a.png"], ".", "a.png would be overwritten"),
        ("reconstruct", ["other/b.png"], ".", "b.png would be overwritten"),
        ("encode", ["other/b.png"], "z.npz", "z.npz exists already"),
        ("reconstruct", ["sorted", "a.png"], "..", "a.png would be overwritten"),
        ("reconstruct", ["a.bmp"], ".", "a.png would be overwritten"),
    ):
        files = [str(tmp_path / one) for one in given]
        to = str((tmp_path / out).resolve())
        assert main([verb, *files, "--bundle", str(tiny_bundle), "--out", to]) == 2
        assert said in capsys.readouterr().err
    assert {path.read_bytes() for path in paths} == {content}


def test_a_process_that_ended_before_it_got_more_is_named():
    pool = mock.Mock(submit=mock.Mock(side_effect=BrokenProcessPool))
    with pytest.raises(bulk.BulkError, match=r"a process ended .*the same command resumes here"):
        bulk._submit(pool, ["a.png"])


@pytest.mark.parametrize("closed, status", [("| true", 141), ("> /dev/full", 2)])
def test_output_that_cannot_be_written(closed, status, tiny_bundle, folder):
    """Results are printed at the end, when Python would only complain."""
    image = folder / "class0" / "0000.png"
    command = f"{sys.executable} -m ade_cli.main score {image} --bundle {tiny_bundle} {closed}"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert done.returncode == status and "Exception ignored" not in done.stderr
    assert status == 141 or "No space left on device" in done.stderr


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full"])
def test_messages_that_cannot_be_written_end_no_work(closed, tiny_bundle, folder, tmp_path):
    """Nor do they join the results on standard output."""
    out = tmp_path / "scores.csv"
    words = f"score {folder} --bundle {tiny_bundle} --out {out} --workers 1"
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m ade_cli.main {words} {closed}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert done.returncode == 0 and out.is_file()
    assert done.stdout.startswith(f"{out}: ")


def test_a_closed_standard_error_is_open_for_child_processes():
    script = (
        "import subprocess, sys; from ade_cli.main import _messages_may_be_lost\n"
        "with _messages_may_be_lost():\n"
        "    sys.exit(subprocess.call([sys.executable, '-c', 'import os; os.fstat(2)']))"
    )
    command = shlex.join([sys.executable, "-c", script])
    assert subprocess.run(["bash", "-c", f"{command} 2>&-"], cwd=ROOT).returncode == 0


def test_suggested_commands_can_be_pasted(tmp_path, monkeypatch):
    on_path = tmp_path / "ade"
    on_path.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for program, typed in (
        (".venv/bin/ade", ".venv/bin/ade"),
        ("/my tools/ade", "'/my tools/ade'"),
        (str(on_path), "ade"),
        ("ade_cli/main.py", "ade"),
    ):
        monkeypatch.setattr(sys, "argv", [program])
        assert command("serve", Path("my bundle")) == f"{typed} serve 'my bundle'"


def test_an_interrupted_command_says_whether_it_resumes():
    """Scores of files are printed at the end: there is nothing to resume."""
    assert resumed(argparse.Namespace(out=None)) == ""
    assert "the same command" in resumed(argparse.Namespace(out="scores.csv"))


def test_any_alpha_that_requests_may_have(tiny_bundle, folder, capsys):
    image = str(folder / "class0" / "0000.png")
    assert main(["score", image, "--bundle", str(tiny_bundle), "--alpha", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["decision"] == "reject"


def test_file_names_that_are_not_utf8(tiny_bundle, folder, tmp_path):
    (tmp_path / "odd").mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "odd" / name).write_bytes((folder / "class0" / "0000.png").read_bytes())
    score(tiny_bundle, tmp_path / "odd", tmp_path / "a.csv")
    (row,) = read(tmp_path / "a.csv")
    assert row["path"] == "caf\\udce9.png" and float(row["bpd"]) > 0
