"""Scoring in bulk with Ray Data: the manifest, and each file once whatever ends."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ade_base.files import LOCK, locked
from ade_base.pictures.read import is_image_name
from ade_base.ports import free_ports
from ade_base.system import available_cores
from benchmarks.ray_cluster import ray_cluster
from serving import bulk
from serving.bulk import BulkError, BulkOptions, FileScorer, score_folder
from serving.engine.bundle import open_bundle
from tests.helpers import PRETRAINED, ROOT, make_folder

pytest.importorskip("fsspec")
parquet = pytest.importorskip("pyarrow.parquet")
import pyarrow as pa  # noqa: E402

from extensions.ray.bulk import manifest, score  # noqa: E402

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (extra ray)"
)
# Small parts, so that a run can be killed between two of them.
SCRIPT = """
import sys
from extensions.ray.bulk import manifest, score
manifest.PART_ROWS = score.PART_ROWS = 32
from ade_cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_manifest_lists_every_image_once(tmp_path):
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


def test_a_manifest_of_another_file_system():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/a/1.png", b"xx")
    memory.pipe_file("/bucket/2.png", b"x")
    rows = list(manifest.list_files("memory://bucket"))
    assert [(row["path"], row["size"]) for row in rows] == [
        ("memory://bucket/2.png", 1),
        ("memory://bucket/a/1.png", 2),
    ]


def test_a_manifest_of_a_host_keeps_its_name():
    """What a URL has before the path is the file system's, whose names lack it."""
    import fsspec
    from fsspec.utils import infer_storage_options

    class Hosted(fsspec.AbstractFileSystem):
        protocol = "hosted"

        def __init__(self, host):  # as SFTP's: an unknown option is an error
            super().__init__()
            assert host == "there"

        @classmethod
        def _strip_protocol(cls, path):
            return str(infer_storage_options(path)["path"])

        @staticmethod
        def _get_kwargs_from_urls(path):
            return {"host": infer_storage_options(path)["host"]}

        def ls(self, path, detail=True, **options):
            return [{"name": f"{path.rstrip('/')}/1.png", "size": 1, "type": "file"}]

        def cat_file(self, path, *args, **options):
            return path.encode()

    fsspec.register_implementation("hosted", Hosted)
    for host, folder in (("me@there:22", "/a/b"), ("me@there:22", "/a/b/"), ("there", "/")):
        (row,) = manifest.list_files(f"hosted://{host}{folder}")
        name = f"{folder.rstrip('/')}/1.png"
        assert row["path"] == f"hosted://{host}{name}"
        assert score.read_any_file(row["path"]) == name.encode()
    with pytest.raises(BulkError, match="has a password") as refused:
        list(manifest.list_files("hosted://me:secret@there/a"))
    assert "secret" not in str(refused.value)


def test_names_that_make_no_url_end_the_listing(monkeypatch):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/names/a::b.png", b"x")
    with pytest.raises(BulkError, match='^memory://names/a::b.png .* splits URLs at "::"'):
        list(manifest.list_files("memory://names"))
    monkeypatch.setattr(MemoryFileSystem, "_strip_protocol", lambda path: "/container")
    with pytest.raises(BulkError, match=r"/container, .* into a manifest \(.parquet\)"):
        list(manifest.list_files("memory://container@account"))


def test_a_folder_with_an_empty_name_ends_the_listing(monkeypatch):
    """So s3fs lists s3://a/b//x.png, which would be missing."""
    from fsspec.implementations.memory import MemoryFileSystem

    listed = [{"name": "/a/b/", "type": "directory"}]
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda *args, **options: listed)
    with pytest.raises(BulkError, match=r"^/a/b// cannot be listed: .* manifest"):
        list(manifest.list_files("memory://a/b"))


@pytest.mark.parametrize(
    ("protocol", "listed", "found", "refused"),
    [
        ("gs", "b/a", [], False),  # marked by an empty object, b/a/
        ("gs", "b/a", ["b/a//x.png"], True),
        ("http", "b/a/", [], False),  # an index with a link to itself, or to /
        ("s3", "b/a", [], False),
        ("s3", "b/a/", [], True),
    ],
)
def test_a_folder_may_list_itself(protocol, listed, found, refused):
    class Store:
        def __init__(self):
            self.protocol = (protocol,)

        def ls(self, path, detail):
            image = {"name": "b/a/1.png", "type": "file"}
            return [{"name": listed, "type": "directory"}, image]

        def find(self, path, prefix):
            return [name for name in found if name.startswith(f"{path}/{prefix}")]

        def invalidate_cache(self):
            pass

    expected = pytest.raises(BulkError, match="^b/a// cannot") if refused else nullcontext()
    with expected:
        assert [about["name"] for about in manifest._walk(Store(), "b/a")] == ["b/a/1.png"]


def test_a_local_path_may_have_colons(tmp_path):
    folder = tmp_path / "a::b"
    folder.mkdir()
    (folder / "1::2.png").write_bytes(b"x")
    (row,) = manifest.list_files(str(folder))
    assert row["path"] == str(folder / "1::2.png")
    source = str(folder / "list.parquet")
    parquet.write_table(pa.table({"path": [row["path"]]}), source)
    assert [other["path"] for other in manifest.read_manifest(source)] == [row["path"]]


def test_a_protocol_that_nobody_knows():
    with pytest.raises(BulkError, match="nowhere://bucket cannot be used: .*nowhere"):
        list(manifest.list_files("nowhere://bucket"))


def test_a_folder_that_cannot_be_listed_ends_the_listing(tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    (tmp_path / "closed").mkdir()
    for name in ("1.png", "closed/2.png"):
        (tmp_path / name).write_bytes(b"x")
    listed = LocalFileSystem.ls

    def ls(self, path, **options):
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return listed(self, path, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    with pytest.raises(BulkError, match=r"cannot be listed: .*Permission denied.*closed"):
        list(manifest.list_files(str(tmp_path)))


def test_a_file_whose_store_fails_is_unreadable(monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    class ClientError(Exception):
        pass

    def fail(*args, **options):
        raise ClientError("503")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    with pytest.raises(OSError, match="ClientError: 503"):
        score.read_any_file("memory://bucket/1.png")


def test_a_pipe_behind_a_url_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.png")
    with pytest.raises(OSError, match="not a regular file"):
        score.read_any_file(f"file://{tmp_path}/p.png")


def test_rows_that_other_processes_write_are_found():
    """The clients of object stores remember listings, and only this process's writes end them."""
    import fsspec

    class Store(fsspec.AbstractFileSystem):
        protocol = "remembering"
        objects: dict[str, bytes] = {}

        def ls(self, path, detail=True, **options):
            path = self._strip_protocol(path)
            listed = self.dircache.get(path) or [
                {"name": name, "size": len(content), "type": "file"}
                for name, content in self.objects.items()
                if self._parent(name) == path
            ]
            self.dircache[path] = listed
            return listed if detail else [about["name"] for about in listed]

        def isdir(self, path):
            return not path.endswith(".parquet")

        def invalidate_cache(self, path=None):
            self.dircache.clear()

        def _open(self, path, mode="rb", **options):
            return io.BytesIO(self.objects[path])

    fsspec.register_implementation("remembering", Store)

    def commit(number):  # as a worker does, in a process of its own
        rows = {"id": [2 * number, 2 * number + 1], "decision": ["accept", "reject"]}
        part = io.BytesIO()
        parquet.write_table(pa.table({**rows, "error": pa.nulls(2, pa.string())}), part)
        Store.objects[f"out/rows/{number}.parquet"] = part.getvalue()

    seen: list[int] = []
    commit(0)
    progress = score._Progress("remembering://out", 4, lambda done, total: seen.append(done))
    progress._report()
    commit(1)
    progress._report()
    assert seen == [2, 4]
    summary = score._count("remembering://out", 4)
    assert (summary.accepted, summary.rejected) == (2, 2)
    list(manifest.list_files("remembering://out"))
    assert not fsspec.filesystem("remembering").dircache, "of any number of folders"


def test_a_store_that_cannot_be_listed_leaves_the_run_alone(monkeypatch, caplog):
    from fsspec.implementations.memory import MemoryFileSystem

    class ClientError(Exception):
        pass

    def fail(*args, **options):
        raise ClientError("503")

    seen: list[int] = []
    progress = score._Progress("memory://out", 4, lambda done, total: seen.append(done))
    with pytest.raises(BulkError, match="of the run"), monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "isdir", fail)
        with progress:
            raise BulkError("of the run")
    assert "memory://out/rows cannot be listed: 503" in caplog.text and not seen
    progress._report()
    assert seen == [0]


def test_parts_are_numbered_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "PART_ROWS", 4)
    paths = [f"{i}.png" for i in range(10)]
    out = str(tmp_path / "manifest[1]")
    assert manifest.write_parts(({"path": path} for path in paths), out) == 10
    parts = sorted(Path(out).iterdir())
    assert len(parts) == 3
    table = pa.concat_tables([parquet.read_table(part) for part in parts])
    assert table["id"].to_pylist() == list(range(10)) and table["path"].to_pylist() == paths
    read = manifest.read_manifest(str(parts[1]))
    assert [row["path"] for row in read] == [os.path.abspath(path) for path in paths[4:8]]
    # As if that listing had been interrupted, and files removed since.
    assert manifest.write_parts(({"path": path} for path in paths[:4]), out) == 4
    assert parquet.read_table(out)["path"].to_pylist() == paths[:4]


@pytest.mark.parametrize("place", ["", "memory://"], ids=["local", "memory"])
def test_other_files_are_kept(place, tmp_path):
    """Such as those of Spark, and of a folder below."""
    out = f"{place}{tmp_path}/out"
    for name in ("part-00000-x.parquet", "more/part-00000000.parquet", "sorted/a.parquet"):
        files, theirs = manifest.file_system(f"{out}/{name}/manifest/{name}")
        files.makedirs(theirs.rpartition("/")[0], exist_ok=True)
        files.pipe_file(theirs, b"precious")
        with pytest.raises(BulkError, match=f"has another file, .*{name}: take a new folder"):
            manifest.write_parts([{"path": "a.png"}], f"{out}/{name}/manifest")
        assert files.cat_file(theirs) == b"precious"


def test_a_source_lies_outside_of_the_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for out, inside in (
        (f"{tmp_path}/out", f"{tmp_path}/out/manifest/part-00000000.parquet"),
        (f"{tmp_path}/out/", f"file://{tmp_path}/link/images"),
        ("memory://a/out", "memory://a/out/"),
    ):
        with pytest.raises(BulkError, match=f"^{inside} must lie outside of {out}"):
            score._prepare(inside, out, {})
    for other in (f"{tmp_path}/output", f"memory://{tmp_path}/out", str(tmp_path)):
        assert not manifest.is_inside(other, f"{tmp_path}/out")


def test_files_to_try_are_spread_over_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "PART_ROWS", 4)
    for count, expected in ((3, [0, 1, 2]), (40, [0, 12, 24, 36]), (6, [0, 2, 4, 5])):
        out = tmp_path / str(count)
        manifest.write_parts(({"path": str(i)} for i in range(count)), str(out / "manifest"))
        found = manifest.some_files(str(out), 4)
        assert found == [str(i) for i in expected], count


def test_a_manifest_without_paths(tmp_path):
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


def test_a_store_that_fails_in_its_own_way_is_named(tmp_path, monkeypatch):
    """Clients of stores have errors of their own, which are neither OSError nor ValueError."""

    class Forbidden(Exception):
        pass

    def refuse(*given):
        raise Forbidden("403 Forbidden")

    parquet.write_table(pa.table({"path": ["a.png"]}), tmp_path / "m.parquet")
    monkeypatch.setattr(manifest.parquet, "ParquetFile", refuse)
    with pytest.raises(BulkError, match=r"m\.parquet cannot be read: 403 Forbidden"):
        list(manifest.read_manifest(str(tmp_path / "m.parquet")))


def test_a_run_without_rows_is_incomplete(tmp_path):
    for _ in range(2):  # without the folder of rows, and with an empty one
        with pytest.raises(BulkError, match="has 0 rows about 0 of 3 files"):
            score._count(str(tmp_path), 3)
        (tmp_path / "rows").mkdir(exist_ok=True)


def test_relative_paths_of_a_manifest_are_from_here(tmp_path):
    """Ray's workers, perhaps on other machines, have other working directories."""
    parquet.write_table(pa.table({"path": ["a/x.png", "s3://b/y.png"]}), tmp_path / "x.parquet")
    rows = manifest.read_manifest(str(tmp_path / "x.parquet"))
    assert [row["path"] for row in rows] == [os.path.abspath("a/x.png"), "s3://b/y.png"]


def test_a_manifest_with_times_of_any_type(tmp_path):
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
def test_a_manifest_with_a_size_that_is_none(tmp_path, size):
    source = str(tmp_path / "x.parquet")
    parquet.write_table(pa.table({"path": ["x", "y"], "size": ["7", None]}), source)
    assert [row["size"] for row in manifest.read_manifest(source)] == [7, None]
    parquet.write_table(pa.table({"path": ["x"], "size": [size]}), source)
    with pytest.raises(BulkError, match="cannot be read: "):
        list(manifest.read_manifest(source))


def test_what_a_worker_makes_of_a_manifest(tmp_path):
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


def test_a_worker_tries_other_files_if_its_first_cannot_be_read(monkeypatch):
    """Of a store where a few files are refused, the others are scored."""
    monkeypatch.setattr(bulk, "RETRY_S", 0.0)
    versions = FileScorer(open_bundle(PRETRAINED), None, BulkOptions()).versions
    files = pa.table({"id": [0], "file": [b"memory://bucket/gone.png"]})
    monkeypatch.setattr(score.fsspec, "url_to_fs", refuse)
    with pytest.raises(BulkError, match="no other file can be read"):
        score.Scorer(str(PRETRAINED), BulkOptions(), versions)(files)
    others = [str(ROOT / "serving" / "examples" / "cat.png")]
    rows = score.Scorer(str(PRETRAINED), BulkOptions(), versions, others)(files)
    assert rows["error"].to_pylist() == ["unreadable"]


def test_a_node_without_the_images_ends_the_run():
    """Its errors would be the rows of files that the other nodes can read."""
    versions = FileScorer(open_bundle(PRETRAINED), None, BulkOptions()).versions
    files = pa.table({"id": [0], "file": [b"/gone/b.png"]})
    scorer = score.Scorer(str(PRETRAINED), BulkOptions(), versions, ["/gone/b.png", "/gone/a.png"])
    with pytest.raises(BulkError, match="^/gone/b.png: No such .* no other file can be read"):
        scorer(files)


def refuse(*args, **options):
    raise RuntimeError("403")


def test_a_worker_that_cannot_start_names_its_host(tmp_path):
    """In one line: of other errors, the user gets Ray's traceback."""
    versions = FileScorer(open_bundle(PRETRAINED), None, BulkOptions()).versions
    for bundle, options, expected in (
        (tmp_path, BulkOptions(), versions),
        (PRETRAINED, BulkOptions(calibration="mine"), versions),
        (PRETRAINED, BulkOptions(), versions._replace(bundle="another")),
    ):
        with pytest.raises(BulkError, match=f"^{re.escape(socket.gethostname())}: .+$"):
            score.Scorer(str(bundle), options, expected)


def test_a_commit_that_was_interrupted_is_pending_again(tmp_path):
    """A move that copied its file, and was killed before it deleted the first one."""
    folder = tmp_path / "out[1]" / "checkpoint"
    folder.mkdir(parents=True)
    for name in ("a.parquet", "a.pending.parquet", "b.pending.parquet", "c.parquet"):
        (folder / name).touch()
    score._uncommit(str(folder.parent))
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["a.pending.parquet", "b.pending.parquet", "c.parquet"]
    score._uncommit(str(tmp_path / "new"))


def test_a_folder_has_one_run_at_a_time(tmp_path):
    scorer = FileScorer(open_bundle(PRETRAINED), None, BulkOptions())
    source, out = str(ROOT / "serving" / "examples"), tmp_path / "out"
    with locked(out / LOCK), pytest.raises(BulkError, match="out is in use by another process"):
        score.score_on_ray(scorer, source, f"{out}/", 1, None, lambda done, total: None)
    assert [path.name for path in out.iterdir()] == [LOCK]


def test_nothing_is_written_beside_the_folder(tmp_path, monkeypatch):
    """In a container it may be a mount point, whose parent cannot be written."""

    def prepare(source, out, plan):
        raise BulkError(f"{os.listdir(tmp_path)} and {os.listdir(out)}")

    monkeypatch.setattr(score, "_prepare", prepare)
    scorer = FileScorer(open_bundle(PRETRAINED), None, BulkOptions())
    with pytest.raises(BulkError, match=re.escape(f"['out'] and ['{LOCK}']")):
        score.score_on_ray(scorer, "in", str(tmp_path / "out"), 1, None, lambda done, total: None)


def test_names_that_are_not_utf_8_are_scored(tmp_path):
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


def wait_for_parts(run, out, log):
    """Wait until some of a run's rows are written, and it still runs."""
    deadline = time.monotonic() + 300
    while len(rows_in(out)) < 3:
        assert run.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def rows_in(out):
    return list((out / "rows").glob("*.parquet"))


def rows_of(out):
    return pa.concat_tables([parquet.read_table(path) for path in rows_in(out)])


@needs_ray
@pytest.mark.slow
def test_a_killed_driver_is_resumed_and_each_file_has_one_row(tiny_bundle, small_images, tmp_path):
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
def test_a_store_that_cannot_be_reached_ends_the_run_until_it_can(tmp_path):
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


ENDS_WORKERS = """
import os, signal
_open = os.open
def opened(path, *args, **options):
    if str(path).endswith("deadly.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return _open(path, *args, **options)
os.open = opened
"""


@needs_ray
@pytest.mark.slow
def test_an_image_that_ends_every_worker_ends_the_run(tmp_path):
    """Ray would start workers for it for ever, without a word."""
    (tmp_path / "sitecustomize.py").write_text(ENDS_WORKERS)
    folder = Path(shutil.copytree(ROOT / "serving" / "examples", tmp_path / "images"))
    (folder / "cat.png").rename(folder / "deadly.png")
    command = [sys.executable, "-m", "ade_cli.main", "score", str(folder), "--engine", "ray"]
    command += ["--bundle", str(PRETRAINED), "--workers", "1", "--out", str(tmp_path / "out")]
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 2 and not rows_in(tmp_path / "out"), run.stderr
    assert run.stderr.splitlines()[-1].startswith("ade score: a process ended (was there too")


@needs_ray
@pytest.mark.slow
def test_a_node_without_the_bundle_is_named(tiny_bundle, tmp_path):
    moved = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, moved)
    script = f"""
import shutil, sys
from ade_cli.main import main
from extensions.ray.bulk import score
score._uncommit = lambda out: shutil.rmtree({str(moved)!r})  # just before Ray starts
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", script, "score", str(ROOT / "serving" / "examples")]
    command += ["--bundle", str(moved), "--engine", "ray", "--workers", "1"]
    command += ["--out", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2, run.stderr
    *_, last = run.stderr.splitlines()
    assert last.startswith(f"ade score: {socket.gethostname()}: {moved}"), run.stderr


@needs_ray
@pytest.mark.slow
def test_an_object_store_holds_the_images_and_the_rows(tiny_bundle, small_images, tmp_path):
    """The run is killed, its progress is seen, and the same command completes it."""
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        store = s3fs.S3FileSystem(
            endpoint_url=endpoint, key="any", secret="any", use_listings_cache=False
        )
        store.mkdir("here")
        folder = make_folder(tmp_path / "images", small_images)
        store.put(str(folder), "here/images", recursive=True)
        command = [sys.executable, "-c", SCRIPT, "score", "s3://here/images"]
        command += ["--bundle", str(tiny_bundle), "--engine", "ray", "--workers", "1"]
        command += ["--out", "s3://here/scores"]
        secrets = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
        environment = {**os.environ, **secrets, "AWS_ENDPOINT_URL": endpoint}
        log = tmp_path / "log.txt"
        with open(log, "wb") as written:
            first = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=written, stderr=written
            )
            deadline = time.monotonic() + 300
            while len(store.glob("here/scores/rows/*.parquet")) < 2:
                assert first.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            time.sleep(2 * score.LOOK_S)  # the folder was seen with few rows
            first.send_signal(signal.SIGKILL)
            first.wait()
        second = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
        )
        assert second.returncode == 0, second.stderr
        parts = [
            parquet.read_table(io.BytesIO(store.cat_file(name)))
            for name in store.glob("here/scores/rows/*.parquet")
        ]
        rows = pa.concat_tables(parts)
        files = [name for name in store.find("here/images") if is_image_name(name)]
        assert sorted(rows["id"].to_pylist()) == list(range(len(files))), rows.num_rows
        assert set(rows["path"].to_pylist()) == {f"s3://{name}" for name in files}
        assert rows["error"].null_count == len(small_images)
        summary = json.loads(store.cat_file("here/scores/summary.json"))
        assert sum(summary.values()) == len(files)
    finally:
        server.stop()


@needs_ray
@pytest.mark.slow
def test_a_node_that_dies_costs_no_row(tiny_bundle, small_images, tmp_path):
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
