"""Scoring in bulk with Ray Data: the manifest, and each file once whatever ends."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.ray_cluster import ray_cluster
from serving.bulk import BulkError, BulkOptions, FileScorer, score_folder
from serving.cores import available_cores
from serving.engine.bundle import open_bundle
from serving.ports import free_ports
from tests.helpers import PRETRAINED, ROOT, make_folder

pytest.importorskip("fsspec")
parquet = pytest.importorskip("pyarrow.parquet")
import pyarrow as pa  # noqa: E402

from handlers.ray_bulk import manifest, score  # noqa: E402

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (extra ray)"
)
# Small parts, so that a run can be killed between two of them.
SCRIPT = """
import sys
from handlers.ray_bulk import manifest, score
manifest.PART_ROWS = score.PART_ROWS = 32
from ade_cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_manifest_lists_every_image_once(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.JPG", "a/3.webp", "a/notes.txt", "4.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x" * 3)
    rows = list(manifest.list_files(str(tmp_path / "in")))
    assert [Path(row["path"]).relative_to(tmp_path / "in").as_posix() for row in rows] == [
        "4.png",
        "a/3.webp",
        "b/1.JPG",
        "b/2.png",
    ]
    assert all(row["size"] == 3 and row["mtime"] > 1e9 for row in rows)


def test_a_manifest_of_another_file_system() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/a/1.png", b"xx")
    memory.pipe_file("/bucket/2.png", b"x")
    rows = list(manifest.list_files("memory://bucket"))
    assert [(row["path"], row["size"]) for row in rows] == [
        ("memory:///bucket/2.png", 1),
        ("memory:///bucket/a/1.png", 2),
    ]


def test_a_folder_that_cannot_be_listed_ends_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    (tmp_path / "closed").mkdir()
    for name in ("1.png", "closed/2.png"):
        (tmp_path / name).write_bytes(b"x")
    listed = LocalFileSystem.ls

    def ls(self: LocalFileSystem, path: str, **options: object) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return listed(self, path, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    with pytest.raises(BulkError, match=r"cannot be listed: .*Permission denied.*closed"):
        list(manifest.list_files(str(tmp_path)))


def test_a_file_whose_store_fails_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    class ClientError(Exception):
        pass

    def fail(*args: object, **options: object) -> bytes:
        raise ClientError("503")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    with pytest.raises(OSError, match="ClientError: 503"):
        score.read_any_file("memory://bucket/1.png")


def test_parts_are_numbered_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PART_ROWS", 4)
    paths = [f"{i}.png" for i in range(10)]
    out = str(tmp_path / "manifest")
    assert manifest.write_parts(({"path": path} for path in paths), out) == 10
    parts = sorted((tmp_path / "manifest").iterdir())
    assert len(parts) == 3
    table = pa.concat_tables([parquet.read_table(part) for part in parts])
    assert table["id"].to_pylist() == list(range(10)) and table["path"].to_pylist() == paths
    read = manifest.read_manifest(str(parts[1]))
    assert [row["path"] for row in read] == [os.path.abspath(path) for path in paths[4:8]]
    # As if that listing had been interrupted, and files removed since.
    assert manifest.write_parts(({"path": path} for path in paths[:4]), out) == 4
    assert parquet.read_table(out)["path"].to_pylist() == paths[:4]


def test_a_manifest_without_paths(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"file": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(BulkError, match="has no column path"):
        list(manifest.read_manifest(str(tmp_path / "x.parquet")))
    with pytest.raises(BulkError, match="cannot be read"):
        list(manifest.read_manifest(str(tmp_path / "y.parquet")))
    for wrong in (None, "", "a\0.png"):
        parquet.write_table(pa.table({"path": ["x", wrong]}), tmp_path / "z.parquet")
        expected = re.escape(f"a path must be text without zero bytes, got {wrong!r}")
        with pytest.raises(BulkError, match=expected):
            list(manifest.read_manifest(str(tmp_path / "z.parquet")))


def test_relative_paths_of_a_manifest_are_from_here(tmp_path: Path) -> None:
    """Ray's workers, perhaps on other machines, have other working directories."""
    parquet.write_table(pa.table({"path": ["a/x.png", "s3://b/y.png"]}), tmp_path / "x.parquet")
    rows = manifest.read_manifest(str(tmp_path / "x.parquet"))
    assert [row["path"] for row in rows] == [os.path.abspath("a/x.png"), "s3://b/y.png"]


def test_a_manifest_with_times_of_any_type(tmp_path: Path) -> None:
    table = {"path": ["x"]}
    for zone in ("UTC", None):  # without one it is UTC, wherever this machine is
        table["mtime"] = pa.array([1_700_000_000_000], pa.timestamp("ms", zone))
        parquet.write_table(pa.table(table), tmp_path / "x.parquet")
        rows = list(manifest.read_manifest(str(tmp_path / "x.parquet")))
        assert rows == [{"path": os.path.abspath("x"), "size": None, "mtime": 1.7e9}]
    table["mtime"] = pa.array(["yesterday"])
    parquet.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(BulkError, match="cannot be read: .*yesterday"):
        list(manifest.read_manifest(str(tmp_path / "x.parquet")))


@pytest.mark.parametrize("size", ["12 bytes", float("nan"), float("inf"), 2.0**63, -1])
def test_a_manifest_with_a_size_that_is_none(tmp_path: Path, size: str | float) -> None:
    source = str(tmp_path / "x.parquet")
    parquet.write_table(pa.table({"path": ["x", "y"], "size": ["7", None]}), source)
    assert [row["size"] for row in manifest.read_manifest(source)] == [7, None]
    parquet.write_table(pa.table({"path": ["x"], "size": [size]}), source)
    with pytest.raises(BulkError, match="cannot be read: "):
        list(manifest.read_manifest(source))


def test_what_a_worker_makes_of_a_manifest(tmp_path: Path) -> None:
    """Without Ray, which only hands the rows around: plan, rows, and their count."""
    bundle, out = open_bundle(PRETRAINED), str(tmp_path / "out")
    source, plan = str(ROOT / "serving" / "examples"), {"model": bundle.model_id}
    total = score._prepare(source, out, plan)
    assert total == 10 == score._prepare(source, out, plan)
    with pytest.raises(BulkError, match="was started with"):
        score._prepare(source, out, {"model": "another"})
    listed = parquet.read_table(f"{out}/manifest")
    files = listed.select(["id", "file"])
    versions = FileScorer(bundle, None, BulkOptions()).versions
    rows = score.Scorer(str(PRETRAINED), BulkOptions(), versions)(files)
    assert rows["id"].to_pylist() == list(range(10)) and rows["path"] == listed["path"]
    assert rows["bpd"].null_count == 0 and set(rows["decision"].to_pylist()) <= {"accept", "reject"}
    (tmp_path / "out" / "rows").mkdir()
    parquet.write_table(rows.slice(0, 6), f"{out}/rows/a.parquet")
    with pytest.raises(BulkError, match="has 6 rows about 6 of 10 files"):
        score._count(out, total)
    parquet.write_table(rows.slice(0, 4), f"{out}/rows/b.parquet")
    with pytest.raises(BulkError, match="has 10 rows about 6 of 10 files"):
        score._count(out, total)
    parquet.write_table(rows.slice(6), f"{out}/rows/b.parquet")
    assert score._count(out, total).scored == 10
    seen: list[tuple[int, int]] = []
    with score._Progress(out, total, lambda *numbers: seen.append(numbers)):
        pass
    assert seen == [(10, 10), (10, 10)]


def test_names_that_are_not_utf_8_are_scored(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    cat = (ROOT / "serving" / "examples" / "cat.png").read_bytes()
    for name in (b"caf\xe9.png", rb"caf\udce9.png"):  # the second looks like the first when printed
        Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name)).write_bytes(cat)
    score._prepare(str(tmp_path / "in"), str(tmp_path / "out"), {})
    files = parquet.read_table(tmp_path / "out" / "manifest").select(["id", "file"])
    versions = FileScorer(open_bundle(PRETRAINED), None, BulkOptions()).versions
    rows = score.Scorer(str(PRETRAINED), BulkOptions(), versions)(files)
    assert [Path(path).name for path in rows["path"].to_pylist()] == [r"caf\udce9.png"] * 2
    assert rows["error"].null_count == 2


def wait_for_parts(run: subprocess.Popen[bytes], out: Path, log: Path) -> None:
    """Wait until some of a run's rows are written, and it still runs."""
    deadline = time.monotonic() + 300
    while len(rows_in(out)) < 3:
        assert run.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def rows_in(out: Path) -> list[Path]:
    return list((out / "rows").glob("*.parquet"))


def rows_of(out: Path) -> pa.Table:
    return pa.concat_tables([parquet.read_table(path) for path in rows_in(out)])


@needs_ray
@pytest.mark.slow
def test_a_killed_driver_is_resumed_and_each_file_has_one_row(
    tiny_bundle: Path, small_images: np.ndarray, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "images", np.concatenate([small_images] * 3))
    (folder / "broken.png").write_bytes(b"junk")
    Image.new("RGB", (20, 20)).save(folder / "large.png")
    expected = tmp_path / "expected.parquet"
    scorer = FileScorer(open_bundle(tiny_bundle), None, BulkOptions())
    score_folder(scorer, folder, expected, 1, lambda done, total: None)
    out = tmp_path / "out"
    arguments = ["score", str(folder), "--bundle", str(tiny_bundle), "--engine", "ray"]
    # As many workers as cores: with too few of Ray's CPUs beside them, resuming waited forever.
    workers = str(available_cores())
    command = [sys.executable, "-c", SCRIPT, *arguments, "--workers", workers, "--out", str(out)]
    options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    with open(tmp_path / "first.txt", "wb") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, **options)
    wait_for_parts(first, out, tmp_path / "first.txt")
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = subprocess.run(command, capture_output=True, text=True, timeout=400, **options)
    assert second.returncode == 0, second.stderr
    rows = rows_of(out)
    files = sum(path.suffix in {".png", ".jpg"} for path in folder.rglob("*"))
    assert sorted(rows["id"].to_pylist()) == list(range(files))
    alone = parquet.read_table(expected)
    assert alone.num_rows == files
    by_path = {str(folder / row["path"]): row for row in alone.to_pylist()}
    for row in rows.to_pylist():
        other = by_path.pop(row["path"])
        assert (row["error"], row["decision"]) == (other["error"], other["decision"])
        assert row["bpd"] == pytest.approx(other["bpd"], abs=1e-5)
    assert not by_path
    assert sum(json.loads((out / "summary.json").read_text()).values()) == files
    third = subprocess.run(command, capture_output=True, text=True, timeout=400, **options)
    assert third.returncode == 2 and "is complete already" in third.stderr


@needs_ray
@pytest.mark.slow
def test_a_store_that_cannot_be_reached_ends_the_run_until_it_can(tmp_path: Path) -> None:
    """Its errors would otherwise become the rows of all files, and the run would be complete."""
    (port,) = free_ports(1)
    images = ROOT / "serving" / "examples"
    urls = [f"http://127.0.0.1:{port}/{path.name}" for path in sorted(images.glob("*.png"))]
    parquet.write_table(pa.table({"path": urls}), tmp_path / "urls.parquet")
    command = [sys.executable, "-m", "ade_cli.main", "score", str(tmp_path / "urls.parquet")]
    command += ["--bundle", str(PRETRAINED), "--engine", "ray", "--workers", "1"]
    command += ["--out", str(tmp_path / "out")]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    first = subprocess.run(command, **options)
    assert first.returncode == 2 and not rows_in(tmp_path / "out"), first.stderr
    *_, last = first.stderr.splitlines()
    assert last.startswith(f"ade score: {urls[0]}: ") and "no other file can be read" in last
    server = ThreadingHTTPServer(
        ("127.0.0.1", port), functools.partial(SimpleHTTPRequestHandler, directory=str(images))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        second = subprocess.run(command, **options)
    finally:
        server.shutdown()
        server.server_close()
    assert second.returncode == 0, second.stderr
    rows = rows_of(tmp_path / "out")
    assert rows.num_rows == len(urls) == rows["error"].null_count


@needs_ray
@pytest.mark.slow
def test_a_node_that_dies_costs_no_row(
    tiny_bundle: Path, small_images: np.ndarray, tmp_path: Path
) -> None:
    """One of three machines is gone while images are scored, and another comes in its place."""
    folder = make_folder(tmp_path / "images", np.concatenate([small_images] * 3))
    out = tmp_path / "out"
    with ray_cluster() as cluster:
        nodes = [cluster.add_worker(2) for _ in range(2)]
        command = [
            *(sys.executable, "-c", SCRIPT, "score", str(folder), "--bundle", str(tiny_bundle)),
            *("--engine", "ray", "--address", cluster.address, "--workers", "2"),
            *("--out", str(out)),
        ]
        log = tmp_path / "log.txt"
        with open(log, "wb") as written:
            run = subprocess.Popen(
                command, cwd=ROOT, env=cluster.environment, stdout=written, stderr=written
            )
        try:
            wait_for_parts(run, out, log)
            cluster.add_worker(2)
            cluster.kill(nodes[0])
            assert run.wait(300) == 0, log.read_text()
        finally:
            run.kill()
    rows = rows_of(out)
    files = sum(path.suffix in {".png", ".jpg"} for path in folder.rglob("*"))
    assert sorted(rows["id"].to_pylist()) == list(range(files))
    assert rows["error"].null_count >= 900
