"""Archives come back, resume where they stopped, and are refused or lose one chunk if hostile."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("constriction")

from ade_base.pictures.limits import ImageError
from ade_cli.main import main
from extensions.codec import decompress, networks
from extensions.codec.chunks import Figures
from extensions.codec.compress import Report, compress
from extensions.codec.errors import CodingError
from extensions.codec.pictures import Picture, read_picture
from extensions.codec.sources import ArraySource, open_source
from extensions.codec.tests.models import MANIFEST, members_of, save_array, saved
from serving.engine.bundle import open_bundle, write_manifest
from serving.engine.engine import InferenceEngine
from tests.helpers import ROOT, make_traps


def contents(folder):
    """What must come back: pixels of PNG files, bytes of all others."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        try:
            image = Image.open(path)
            found[name] = (image.mode, image.size, image.tobytes())
        except OSError:
            found[name] = path.read_bytes()
    return found


def test_a_folder_comes_back(folder, bundle, tmp_path, capsys):
    out, back = tmp_path / "out.ade", tmp_path / "back"
    assert main(["compress", str(folder), str(out), "--bundle", str(bundle.folder)]) == 0
    printed = capsys.readouterr().out
    assert "net rate" in printed and "bound of ade score" in printed
    assert f"archive: {out.stat().st_size} bytes" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "out.ade"]
    assert main(["decompress", str(out), str(back), "--bundle", str(bundle.folder)]) == 0
    assert contents(back) == contents(folder)
    capsys.readouterr()
    # Nothing is overwritten.
    for words in (["compress", folder, out], ["decompress", out, back]):
        assert main([*map(str, words), "--bundle", str(bundle.folder)]) == 2
        said = capsys.readouterr().err
        assert "exists" in said and "img/s" not in said
    assert (
        main(["decompress", str(out), str(tmp_path / "x.npy"), "--bundle", str(bundle.folder)]) == 2
    )
    assert "holds files" in capsys.readouterr().err


def test_files_that_cannot_be_read_are_named_and_left_out(folder, bundle, tmp_path, capsys):
    """An archive is often kept instead of its files: its exit status says that some lack."""
    expected = contents(folder)
    reasons = make_traps(folder)
    out, back = tmp_path / "out.ade", tmp_path / "back"
    words = ["--bundle", str(bundle.folder)]
    assert main(["compress", str(folder), str(out), *words]) == 3
    said = capsys.readouterr().err
    assert all(f"left out {folder / name}: {why}" in said for name, why in reasons.items())
    assert f"warning: 4 files could not be read: not in {out}" in said
    # Pictures of other kinds may be lost as well; other files are only counted.
    kept = tmp_path / "kept"
    kept.mkdir()
    shutil.copy(next(folder.glob("*.png")), kept)
    (kept / "labels.csv").touch()
    for status, other in ((0, None), (3, "a.jxl")):
        if other is not None:
            (kept / other).touch()
        assert main(["compress", str(kept), str(tmp_path / f"{status}.ade"), *words]) == status
        count = "2 files" if other else "1 file"
        assert f"{count} of other kinds: not in {tmp_path / f'{status}.ade'}" in (
            capsys.readouterr().err
        )
    assert main(["decompress", str(out), str(back), *words]) == 0
    assert contents(back) == expected
    only = tmp_path / "only"
    only.mkdir()
    make_traps(only)
    assert main(["compress", str(only), str(tmp_path / "none.ade"), *words]) == 2
    assert "only: no image can be read; " in capsys.readouterr().err
    assert not list(tmp_path.glob("none*"))


def test_an_archive_in_its_folder_is_no_other_file(folder, bundle, capsys):
    words = ["compress", str(folder), str(folder / "all.ade"), "--bundle", str(bundle.folder)]
    assert main(words) == 0
    assert "of other kinds" not in capsys.readouterr().err


def test_a_calibration_is_not_needed(bundle, small_images, tmp_path, monkeypatch):
    """Neither the bundle's own, which may be of another version, nor a named one."""
    copy = shutil.copytree(bundle.folder, tmp_path / "bundle")
    (copy / "calibration.npz").write_bytes(b"of another version")
    write_manifest(copy, bundle.manifest)
    monkeypatch.setattr(InferenceEngine, "calibrations", None)
    source = save_array(tmp_path / "in.npy", small_images[:100])
    figures = compress(source, tmp_path / "out.ade", open_bundle(copy)).figures
    assert figures.coded and figures.bound_bits


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"an array of uint8 .*, got float32 \(2, 8, 8, 3\)"),
        (np.zeros((2, 8, 8), np.uint8), r"an array of uint8 .*, got uint8 \(2, 8, 8\)"),
        (np.zeros((2, 8, 8, 4), np.uint8), "1 or 3 channels"),
        (np.zeros((0, 8, 8, 3), np.uint8), "in.npy holds no images"),
    ],
)
def test_arrays_that_are_no_images(array, message, tmp_path):
    with pytest.raises(CodingError, match=message):
        save_array(tmp_path / "in.npy", array)


@pytest.mark.filterwarnings("ignore:unclosed file")  # NumPy leaves it to the garbage collector
def test_sources_that_are_none(tmp_path):
    with pytest.raises(CodingError, match="holds no images"):
        open_source(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(CodingError, match="neither a folder of images nor an array"):
        open_source(tmp_path / "a.txt")
    for content in (b"", b"text", b"PK\3\4"):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(CodingError, match="a.npy is not an array"):
            open_source(tmp_path / "a.npy")
    with open(tmp_path / "a.npy", "wb") as file:
        np.savez(file, images=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(CodingError, match="a.npy is not an array: it holds several arrays"):
        open_source(tmp_path / "a.npy")
    os.mkfifo(tmp_path / "pipe.npy")  # opening it would wait for a writer
    with pytest.raises(CodingError, match=r"pipe.npy must be a regular file"):
        open_source(tmp_path / "pipe.npy")


def test_an_array_that_is_cut_off_while_it_is_read(tmp_path):
    """Mapped into memory, it would end the process."""
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    source = save_array(tmp_path / "a.npy", images)
    assert np.array_equal(source.read(2).pixels, images[2])
    os.truncate(tmp_path / "a.npy", 64 * 64 * 3)
    with pytest.raises(OSError, match="cut off while it was read"):
        source.read(2)
    columns = save_array(tmp_path / "b.npy", np.asfortranarray(images))
    assert np.array_equal(columns.read(1).pixels, images[1])


def test_a_file_that_can_be_opened_but_not_read_is_left_out(tmp_path, monkeypatch):
    """Later, the archive has its number: it would have to be made again."""
    for name in "ab":
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{name}.png")

    def read(path):
        if path.name == "a.png":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return path.read_bytes()

    monkeypatch.setattr("extensions.codec.sources.read_file", read)
    source = open_source(tmp_path)
    assert source.count == 1 and source.left_out == [(tmp_path / "a.png", "Input/output error")]


def with_chunk(kind, content):
    """A PNG with a further chunk before its pixels."""
    named = kind + content
    chunk = len(content).to_bytes(4, "big") + named + zlib.crc32(named).to_bytes(4, "big")
    return saved("PNG")[:33] + chunk + saved("PNG")[33:]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        saved("JPEG"),
        saved("BMP"),
        saved("PNG", "RGBA"),
        saved("PNG", "P"),
        saved("PNG", "1"),
        saved("PNG", dpi=(300, 300)),
        saved("PNG")[:-12],  # without IEND
        saved("PNG")[:-20] + b"x" + saved("PNG")[-19:],  # a wrong checksum
        saved("PNG") + b"more",
        saved("PNG") + saved("PNG")[-12:],
        with_chunk(b"tEXt", b"Comment\0mine"),
        with_chunk(b"gAMA", bytes(4)),
    ],
)
def test_a_file_that_its_pixels_do_not_restore_is_kept(data):
    assert read_picture(data) == Picture(None, data, True)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_a_file_that_its_pixels_restore_has_them(mode, channels):
    pixels = read_picture(saved("PNG", mode)).pixels
    assert pixels is not None and pixels.shape == (8, 8, channels)


def test_a_busy_machine_is_no_reason_to_store_a_file(tmp_path, monkeypatch):
    """It would take more room for good."""

    def fail(data):
        raise ImageError("too_large", "not decoded in time", is_transient=True)

    (tmp_path / "a.png").write_bytes(saved("PNG"))
    monkeypatch.setattr("extensions.codec.pictures.read_image", fail)
    with pytest.raises(CodingError, match=r"a.png: not decoded in time: repeat the command"):
        open_source(tmp_path).read(0)


def test_another_processor_is_announced_and_its_numbers_are_checked(
    archived, bundle, tmp_path, monkeypatch
):
    here = networks.fingerprint()
    monkeypatch.setattr(decompress, "fingerprint", lambda: {**here, "cpu": "Another CPU"})
    warnings: list[str] = []
    result = decompress.decompress(archived, tmp_path / "a.npy", bundle, warnings.append)
    assert not result.lost and "cpu:" in warnings[0] and "Another CPU" in warnings[0]
    # If the last digits of a network differ, the images do not come back, and this is noticed.
    run = networks.Networks.run
    monkeypatch.setattr(
        networks.Networks,
        "run",
        lambda self, graph, inputs: [v * np.float32(1 + 2e-7) for v in run(self, graph, inputs)],
    )
    with pytest.raises(CodingError, match=r"no image came back: .* this processor computes other"):
        decompress.decompress(archived, tmp_path / "b.npy", bundle)
    assert not (tmp_path / "b.npy").exists()


def test_chunks_that_do_not_come_back_are_stored_without_the_model(
    bundle, small_images, tmp_path, monkeypatch
):
    run, calls = networks.Networks.run, iter(range(10**9))
    with monkeypatch.context() as patch:
        patch.setattr(
            networks.Networks,
            "run",
            lambda self, graph, inputs: [
                v + np.float32(1e-6 * next(calls)) for v in run(self, graph, inputs)
            ],
        )
        source = save_array(tmp_path / "in.npy", small_images[:100])
        report = compress(source, tmp_path / "out.ade", bundle)
    assert report.not_reproduced == 1
    assert "did not reproduce" in "\n".join(report.lines())
    decompress.decompress(tmp_path / "out.ade", tmp_path / "back.npy", bundle)
    assert np.array_equal(np.load(tmp_path / "back.npy"), small_images[:100])


@pytest.mark.parametrize("whole", [0, 1, 3, 4])
def test_an_interrupted_archive_is_resumed(archived, bundle, tmp_path, whole):
    """What kill -9 leaves is a folder of whole chunks, perhaps with bits that lack their table."""
    good, members = archived.read_bytes(), members_of(archived)
    archived.unlink()
    part = tmp_path / "out.ade.part"
    part.mkdir()
    manifest = json.loads(members[MANIFEST])
    del manifest["chunks"]
    (part / MANIFEST).write_text(json.dumps(manifest))
    (part / "archive.tmp").write_bytes(good[:100])
    for name in sorted(members)[: 2 * whole + 1]:
        if name != MANIFEST:
            (part / name).write_bytes(members[name])
    report = compress(ArraySource(tmp_path / "in.npy"), archived, bundle)
    assert report.resumed == min(40 * whole, 150) and not part.exists()
    decompress.decompress(archived, tmp_path / "back.npy", bundle)
    assert np.array_equal(np.load(tmp_path / "back.npy"), np.load(tmp_path / "in.npy"))


def test_a_part_of_something_else_is_refused(archived, bundle, small_images, tmp_path):
    part = tmp_path / "new.ade.part"
    with zipfile.ZipFile(archived) as file:
        file.extractall(part)
    for images, message in (
        (small_images[:120], "other values of shape: remove it"),
        (255 - small_images[:150], "images have changed since"),
    ):
        source = save_array(tmp_path / "other.npy", images)
        with pytest.raises(CodingError, match=message):
            compress(source, tmp_path / "new.ade", bundle)
    (part / MANIFEST).unlink()
    with pytest.raises(CodingError, match="another folder: remove it, or take another name"):
        compress(source, tmp_path / "new.ade", bundle)
    shutil.rmtree(part)
    (tmp_path / "theirs").mkdir()
    for make in (lambda: part.write_text("a note"), lambda: part.symlink_to(tmp_path / "theirs")):
        make()
        with pytest.raises(CodingError, match="is in the way: remove it, or take another name"):
            compress(source, tmp_path / "new.ade", bundle)
        part.unlink()
    assert not (tmp_path / "new.ade").exists() and not list((tmp_path / "theirs").iterdir())


@pytest.mark.slow
def test_killed_at_random_moments(bundle, small_images, tmp_path):
    images = np.concatenate([small_images] * 3)
    np.save(tmp_path / "in.npy", images)
    out, part = tmp_path / "out.ade", tmp_path / "out.ade.part"
    script = (
        "import sys; from extensions.codec import compress; compress.MAX_IMAGES = 40\n"
        "from ade_cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["compress", str(tmp_path / "in.npy"), str(out), "--bundle", str(bundle.folder)]
    command = [sys.executable, "-c", script, *words]
    for least in (1, 5, 9):
        process = subprocess.Popen(command, cwd=ROOT)
        while process.poll() is None and len(list(part.glob("*.json"))) < least:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not out.exists()
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "compressed before" in found.stdout and not part.exists()
    decompress.decompress(out, tmp_path / "back.npy", bundle)
    assert np.array_equal(np.load(tmp_path / "back.npy"), images)


def test_what_an_archive_cannot_hold_is_refused_before_the_work(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b\\c.png").touch()
    deep = tmp_path / "deep" / (64 * "a/")
    deep.mkdir(parents=True)
    (deep / "b.png").touch()
    for folder in (tmp_path / "a", tmp_path / "deep"):
        with pytest.raises(CodingError, match="no backslash, .* at most 63 folders"):
            open_source(folder)
    assert open_source(tmp_path / "deep" / "a").count == 1


def test_the_report_counts_each_way_of_storing():
    figures = Figures(images=20, coded=8, initial=10, coded_bits=3200, stored_bytes=50)
    first, rate, whole, *_ = Report(100, figures, archive_bytes=950).lines()
    assert first.startswith("20 images: 8 coded by the model, 10 stored to start the coder")
    assert "2 stored because the model cannot code them" in first
    assert "4.0000 bits per dimension" in rate and "4.0000 bits per dimension" in whole
    assert Report(100, Figures(images=1)).lines()[0].startswith("1 image: 0 coded")


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_other_sizes_are_little_larger_than_webp(channels, bundle, tmp_path):
    shape = (3, 16, 16, channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    source = save_array(tmp_path / "in.npy", images)
    compress(source, tmp_path / "out.ade", bundle)
    webp = sum(len(source.read(i).stored) for i in range(3))
    assert (tmp_path / "out.ade").stat().st_size < webp + 1200  # the manifest and a table
    decompress.decompress(tmp_path / "out.ade", tmp_path / "back.npy", bundle)
    assert np.array_equal(np.load(tmp_path / "back.npy"), images)
