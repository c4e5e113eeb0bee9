"""Files that are written whole or not at all, and folders that several processes make at once."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from ade_base.files import (
    image_paths,
    new_folder,
    only_writer,
    preallocated,
    read_file,
    replacing,
    write_text,
)
from ade_base.pictures.read import read_image
from ade_cli.main import main
from export.gate.images import usable
from export.write import ExportError, export_bundle
from serving.bulk import BulkError, BulkOptions, FileScorer, score_folder
from serving.engine.bundle import open_bundle, verify_bundle
from tests.helpers import ROOT, full_disk, make_folder
from training.datasets.files import decode_into
from training.datasets.folder import first_size
from training.runs import _save


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"first")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"second")
        raise ZeroDivisionError
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]
    with replacing(path, text=True) as file:
        file.write("é\r\n")
    assert path.read_bytes() == b"\xc3\xa9\r\n"
    before = os.umask(0o022)
    os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~before


def test_a_link_is_replaced_and_not_followed(tiny_bundle, tmp_path, small_images):
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    folder = make_folder(tmp_path / "images", small_images[:2])
    samples = tmp_path / "samples.npy"
    samples.symlink_to(theirs)
    assert main(["sample", "--bundle", str(tiny_bundle), "--out", str(samples)]) == 0
    assert not samples.is_symlink() and np.load(samples) is not None
    (tmp_path / "scores.csv.part").symlink_to(theirs)
    with pytest.raises(BulkError, match=r"scores.csv.part: Too many levels of symbolic links"):
        scorer = FileScorer(open_bundle(tiny_bundle), None, BulkOptions())
        score_folder(scorer, folder, tmp_path / "scores.csv", 1, lambda done, total: None)
    assert theirs.read_text() == "precious"


def test_the_first_to_finish_makes_the_folder(tmp_path):
    both = Barrier(2)

    def make(text):
        try:
            with new_folder(tmp_path / "out", ValueError) as folder:
                both.wait()
                (folder / "file").write_text(text)
            return text
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(make, "ab"))
    content = (tmp_path / "out" / "file").read_text()
    assert content in results
    assert f"{tmp_path / 'out'} was made by another process meanwhile: it stays as it is" in results
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.usefixtures("traced_before")
def test_an_export_that_another_overtakes(tiny_checkpoint, tiny_bundle, small_images, tmp_path):
    out = tmp_path / "out"

    def report(line):
        if line == "testing parity":  # the other one is done by now
            shutil.copytree(tiny_bundle, out)

    with pytest.raises(
        ExportError, match="was made by another process meanwhile: it stays as it is"
    ):
        export_bundle(tiny_checkpoint, out, "late", small_images[:40], None, report)
    assert verify_bundle(out).name == "tiny" and list(tmp_path.iterdir()) == [out]


def test_files_that_macos_adds_are_no_images_of_a_folder(tmp_path):
    for name in ("cat.PNG", "._cat.PNG", "__MACOSX/._cat.PNG", ".cat.png", "cat.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(image_paths(tmp_path)) == [".cat.png", "cat.PNG"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """Its images would be missing from a table in silence."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    scandir = os.scandir

    def failing(path):  # as of another user's folder, whoever runs the tests
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(PermissionError, match="b'"):
        list(image_paths(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(image_paths(tmp_path / "nowhere"))


def test_a_folder_in_place_of_a_file_leaves_no_descriptor_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(OSError, match="not a regular file"):
            read_file(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_client_can_be_imported_without_unix():
    """Windows has no ``resource``, no forks, and not these flags."""
    code = """
import os, sys
sys.modules["resource"] = None
import pathlib, httpx, numpy, PIL.Image, filelock
del os.register_at_fork, os.O_NONBLOCK, os.O_CLOEXEC
import ade_client.client
from ade_base.files import read_file
print(len(read_file(pathlib.Path(sys.argv[1]))))
"""
    cat = ROOT / "serving" / "examples" / "cat.png"
    done = subprocess.run([sys.executable, "-c", code, cat], capture_output=True, text=True)
    assert done.stdout.strip() == str(cat.stat().st_size), done.stderr


def test_cores_are_known_without_an_affinity(monkeypatch, capsys):
    """macOS and Windows have none."""
    monkeypatch.delattr("os.sched_getaffinity")
    with pytest.raises(SystemExit) as ended:
        main(["score", "--help"])
    assert ended.value.code == 0 and "--workers" in capsys.readouterr().out


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch, capsys):
    with full_disk(1000), pytest.raises(OSError, match=r"File too large: '.*/whole'"):
        write_text(tmp_path / "whole", "x" * 2000)
    with (
        full_disk(1000),
        pytest.raises(OSError, match=r"File too large: '.*/folder'"),
        new_folder(tmp_path / "folder", ValueError) as folder,
    ):
        _save({"weights": torch.zeros(1000)}, folder / "raw.safetensors")
    copied = OSError(errno.ENOSPC, "No space", "source", None, "copy")  # as shutil raises it
    with pytest.raises(OSError, match="No space: '.*/whole'$"), replacing(tmp_path / "whole"):
        raise copied
    with pytest.raises(OSError, match="^no errno$"), replacing(tmp_path / "whole"):
        raise OSError("no errno")
    assert not list(tmp_path.iterdir())

    def fail(args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ade_cli.recipes.run", fail)
    assert main(["recipes"]) == 2
    assert capsys.readouterr().err == "ade recipes: No space left on device\n"


def test_errors_name_the_file_that_was_given_and_come_before_the_work(capsys, monkeypatch):
    """No file can be made in /proc, not even by root."""
    out = Path("/proc/out.png")
    for write in (replacing(out), new_folder(out, ValueError)):
        with pytest.raises(OSError, match="No such file") as raised, write:
            raise AssertionError
        assert raised.value.filename == str(out)

    def refuse(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("ade_base.files.FileLock.acquire", refuse)
    with pytest.raises(OSError, match="Read-only") as raised, only_writer(out, ValueError):
        raise AssertionError
    assert raised.value.filename == str(out)
    assert main(["sample", "--bundle", "none", "--out", str(out)]) == 2
    error = "ade sample: /proc/out.png cannot be written: No such file or directory\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(
    "sign, status, said",
    [
        (signal.SIGTERM, 143, ""),
        (signal.SIGINT, 130, "ade train: interrupted"),
        (signal.SIGHUP, 129, ""),  # of a terminal that was closed
    ],
)
def test_nothing_unfinished_is_left_by_a_signal(sign, status, said, tmp_path, monkeypatch, capsys):
    def run(args):
        with new_folder(tmp_path / "out", ValueError):
            signal.raise_signal(sign)

    monkeypatch.setattr("ade_cli.train.run", run)
    # Whatever started the tests may have set these otherwise, such as nohup.
    usual = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    before = {one: signal.signal(one, handler) for one, handler in usual.items()}
    try:
        ended = main(["train", "vae", "--data", "x", "--out", "x"])
    except SystemExit as end:
        ended = end.code
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert ended == status and said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_interruption_says_how_to_continue(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("ade_cli.train.run", interrupt)
    for made, said in (
        (None, ": the same command starts again"),
        ("run.json", "; there is no checkpoint yet: --resume starts from the beginning"),
        ("checkpoints/step-1/state.json", "; --resume continues from the last checkpoint"),
    ):
        if made:
            (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / made).touch()
        assert main(["train", "vae", "--data", "x", "--out", str(tmp_path)]) == 130
        assert capsys.readouterr().err == f"ade train: interrupted{said}\n"
    monkeypatch.setattr("ade_cli.fit.run", interrupt)
    for made, said in (
        ("plan.json", ": the same command reads the images again"),
        ("cache/images-1.json", ": the same command resumes from here"),
    ):
        (tmp_path / made).parent.mkdir(exist_ok=True)
        (tmp_path / made).touch()
        assert main(["fit", "x", "--out", str(tmp_path)]) == 130
        assert capsys.readouterr().err == f"ade fit: interrupted{said}\n"
    monkeypatch.setattr("ade_cli.main._module", interrupt)  # while packages are imported
    assert main(["train"]) == 130 and capsys.readouterr().err == "ade train: interrupted\n"


def test_an_array_for_which_there_is_no_room(tmp_path):
    with (
        open(tmp_path / "a.npy", "x+b") as file,
        pytest.raises(ValueError, match=r"no room for 1048576\.0 GiB"),
    ):
        preallocated(file, (2**50,), tmp_path, ValueError)
    with open(tmp_path / "b.npy", "x+b") as file:
        preallocated(file, (2, 3), tmp_path, ValueError)[1] = 7
    assert np.load(tmp_path / "b.npy").tolist() == [[0, 0, 0], [7, 7, 7]]


def test_an_image_for_which_memory_does_not_suffice_ends_no_run(
    tiny_bundle, small_images, tmp_path, monkeypatch
):
    examples = ROOT / "serving" / "examples"
    good, huge = (Path(shutil.copy(examples / name, tmp_path)) for name in ("cat.png", "dog.png"))

    def read(data, size=None):
        if data == huge.read_bytes():
            raise MemoryError
        return read_image(data, size=None)

    monkeypatch.setattr("serving.ingest.picture.read_image", read)
    monkeypatch.setattr("training.datasets.files.read_image", read)
    monkeypatch.setattr("training.datasets.folder.read_image", read)
    assert first_size([huge, good]) == 32
    lines: list[str] = []
    found, errors = usable("photos", [huge.read_bytes(), small_images[0]], (8, 8, 3), lines.append)
    assert len(found) == 1 and errors == [("image 0", "there is no memory to decode it")]
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    monkeypatch.setattr("training.datasets.files.RETRY_S", 0.0)
    skipped = decode_into(pixels, 8, [huge, good], Path.read_bytes, lines.append)
    assert skipped == ({0: "there is no memory to decode it"}, {0}) and pixels[1].any()


def test_too_little_memory_is_no_traceback(monkeypatch, capsys):
    for reason, said in (
        ("", ""),
        ("Unable to allocate 9.00 TiB", ": Unable to allocate 9.00 TiB"),
    ):
        monkeypatch.setattr("ade_cli.recipes.run", Mock(side_effect=MemoryError(reason)))
        assert main(["recipes"]) == 2
        assert capsys.readouterr().err == f"ade recipes: there is not enough memory{said}\n"


def test_unusable_files_are_named_in_order(monkeypatch):
    """Threads finish in any order, and messages name the first file."""
    monkeypatch.setattr("training.datasets.files.available_cores", lambda: 2)
    second = Event()

    def read(name):
        if name == "first":
            assert second.wait(10)
        else:
            second.set()
        return b"no image"

    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    skipped, _ = decode_into(pixels, 8, ["first", "second"], read, lambda line: None)
    assert list(skipped) == [0, 1]
