"""Scoring in bulk with Ray Data: the manifest, and each file once whatever ends."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
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
    """Or an empty one: so s3fs lists s3://a/b//x.png, which would be missing."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    with pytest.raises(BulkError, match="nowhere://bucket cannot be used: .*nowhere"):
        list(manifest.list_files("nowhere://bucket"))
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/names/a::b.png", b"x")
    with pytest.raises(BulkError, match='^memory://names/a::b.png .* splits URLs at "::"'):
        list(manifest.list_files("memory://names"))
    listed = [{"name": "/a/b/", "type": "directory"}]
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda *args, **options: listed)
    with pytest.raises(BulkError, match=r"^/a/b// cannot be listed: .* manifest"):
        list(manifest.list_files("memory://a/b"))
    monkeypatch.setattr(MemoryFileSystem, "_strip_protocol", lambda path: "/container")
    with pytest.raises(BulkError, match=r"/container, .* into a manifest \(.parquet\)"):
        list(manifest.list_files("memory://container@account"))


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


def test_what_a_manifest_may_say(tmp_path):
    """Relative paths are from here: Ray's workers may be on other machines.

    Times without a zone are UTC, wherever this machine is.
    """
    folder = tmp_path / "a::b"
    folder.mkdir()
    (folder / "1::2.png").write_bytes(b"x")
    (found,) = manifest.list_files(str(folder))
    assert found["path"] == str(folder / "1::2.png")
    source = str(folder / "list.parquet")
    paths = [found["path"], "a/x.png", "s3://b/y.png"]
    for zone in ("UTC", None):
        times = pa.array([1_700_000_000_000] * 3, pa.timestamp("ms", zone))
        table = {"path": paths, "size": ["7", None, "8"], "mtime": times}
        parquet.write_table(pa.table(table), source)
        expected = zip([paths[0], os.path.abspath(paths[1]), paths[2]], (7, None, 8), strict=True)
        assert list(manifest.read_manifest(source)) == [
            {"path": path, "size": size, "mtime": 1.7e9} for path, size in expected
        ]


@pytest.mark.parametrize(
    "columns, message",
    [
        (None, "cannot be read"),
        ({"file": ["x"]}, "has no column path"),
        *(
            ({"path": ["x", path]}, f"a path must be text without zero bytes, got {path!r}")
            for path in (None, "", "a\0.png")
        ),
        ({"path": ["x"], "mtime": ["yesterday"]}, "cannot be read"),
        *(
            ({"path": ["x"], "size": [size]}, "cannot be read: ")
            for size in ("12 bytes", float("nan"), float("inf"), 2.0**63, -1)
        ),
    ],
)
def test_manifests_that_are_refused(columns, message, tmp_path):
    source = tmp_path / "x.parquet"
    if columns is not None:
        parquet.write_table(pa.table(columns), source)
    with pytest.raises(BulkError, match=re.escape(message)):
        list(manifest.read_manifest(str(source)))


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
    for _ in range(2):  # without the folder of rows, and with an empty one
        with pytest.raises(BulkError, match="has 0 rows about 0 of 10 files"):
            score._count(out, total)
        (tmp_path / "out" / "rows").mkdir(exist_ok=True)
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


def scoring(source, bundle, out, *options, program=("-m", "ade_cli.main"), workers=1):
    """The command that scores on Ray."""
    words = ["score", source, "--bundle", bundle, "--engine", "ray", "--workers", workers]
    return [sys.executable, *program, *map(str, [*words, "--out", out, *options])]


def ended(command, **variables):
    """Run a command to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


@contextmanager
def begun(command, log, **variables):
    """A command that runs, and is killed at the end of the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    with open(log, "wb") as out:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        yield run
    finally:
        run.kill()
        run.wait()


def images_in(folder):
    return sum(path.suffix in {".png", ".jpg"} for path in folder.rglob("*"))


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
    # As many workers as cores: with too few of Ray's CPUs beside them, resuming waited forever.
    cores = available_cores()
    command = scoring(folder, tiny_bundle, out, program=("-c", SCRIPT), workers=cores)
    with begun(command, tmp_path / "log.txt") as first:
        wait_for_parts(first, out, tmp_path / "log.txt")
    second = ended(command)
    assert second.returncode == 0, second.stderr
    rows, files = rows_of(out), images_in(folder)
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
    third = ended(command)
    assert third.returncode == 2 and "is complete already" in third.stderr


@needs_ray
@pytest.mark.slow
def test_a_store_that_cannot_be_reached_ends_the_run_until_it_can(tmp_path):
    """Its errors would otherwise become the rows of all files, and the run would be complete."""
    (port,) = free_ports(1)
    images = ROOT / "serving" / "examples"
    urls = [f"http://127.0.0.1:{port}/{path.name}" for path in sorted(images.glob("*.png"))]
    parquet.write_table(pa.table({"path": urls}), tmp_path / "urls.parquet")
    command = scoring(tmp_path / "urls.parquet", PRETRAINED, tmp_path / "out")
    first = ended(command)
    assert first.returncode == 2 and not rows_in(tmp_path / "out"), first.stderr
    *_, last = first.stderr.splitlines()
    assert last.startswith(f"ade score: {urls[0]}: ") and "no other file can be read" in last
    server = ThreadingHTTPServer(
        ("127.0.0.1", port), functools.partial(SimpleHTTPRequestHandler, directory=str(images))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        second = ended(command)
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
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = ended(scoring(folder, PRETRAINED, tmp_path / "out"), PYTHONPATH=paths)
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
    images = ROOT / "serving" / "examples"
    run = ended(scoring(images, moved, tmp_path / "out", program=("-c", script)))
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
        command = scoring(
            "s3://here/images", tiny_bundle, "s3://here/scores", program=("-c", SCRIPT)
        )
        variables = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "any")
        variables["AWS_ENDPOINT_URL"] = endpoint
        log = tmp_path / "log.txt"
        with begun(command, log, **variables) as first:
            deadline = time.monotonic() + 300
            while len(store.glob("here/scores/rows/*.parquet")) < 2:
                assert first.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            time.sleep(2 * score.LOOK_S)  # the folder was seen with few rows
        second = ended(command, **variables)
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
        options = ("--address", cluster.address)
        command = scoring(folder, tiny_bundle, out, *options, program=("-c", SCRIPT), workers=2)
        log = tmp_path / "log.txt"
        with begun(command, log, **cluster.environment) as run:
            wait_for_parts(run, out, log)
            cluster.add_worker(2)
            cluster.kill(nodes[0])
            assert run.wait(300) == 0, log.read_text()
    rows, files = rows_of(out), images_in(folder)
    assert sorted(rows["id"].to_pylist()) == list(range(files))
    assert rows["error"].null_count >= 900
