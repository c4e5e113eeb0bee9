"""Zips, pictures and batches that the page reads are bounded."""

import contextlib
import io
import struct
import threading
import zipfile

import gradio as gr
import numpy as np
import psutil
import pytest
from PIL import Image

from ade_base.pictures.show import write_png
from serving.ingest.requests import MAX_BODY_BYTES
from serving.page import contents as page_contents
from serving.page.contents import batches, contents
from serving.page.history import remember
from serving.page.inputs import made_here
from serving.page.reproduce import read_text
from tests.bomb_files import chunk
from tests.running_page import (
    MODEL,
    call,
    function_of,
    lying_zip,
    page_process,  # noqa: F401
    score_of,
    upload,
)


@pytest.fixture
def inbox(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return tmp_path


def test_a_zip_is_unpacked_within_bounds(inbox):
    def refused(path):
        with pytest.raises(gr.Error) as error:
            list(contents([str(path)]))
        return str(error.value.message)

    bomb = lying_zip(inbox / "bomb.zip", "large.png", 255 * 2**20, 255 * 2**20)
    assert bomb.stat().st_size < 300_000
    assert "large.png in bomb.zip is too large: an image file may have at most 16 MiB" in refused(
        bomb
    )
    lie = lying_zip(inbox / "lie.zip", "a.png", 255 * 2**20, 1000)
    with contextlib.suppress(gr.Error):
        assert sum(len(data) for _, data in contents([str(lie)])) <= 1000
    (inbox / "no.zip").write_bytes(b"PK nothing")
    assert "no.zip cannot be unpacked" in refused(inbox / "no.zip")
    (inbox / "cut.zip").write_bytes(bomb.read_bytes()[:-30])
    assert "cut.zip cannot be unpacked" in refused(inbox / "cut.zip")
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(inbox / "other.zip", "w", method) as archive:
            archive.writestr("a.png", bytes(2**20))
        assert "compressed by another method" in refused(inbox / "other.zip")
    with zipfile.ZipFile(inbox / "many.zip", "w") as archive:
        for i in range(page_contents.MOST_ENTRIES + 1):
            archive.writestr(f"{i}.txt", b"")
    assert "At most 10000 files in zips at once" in refused(inbox / "many.zip")
    for number, is_refused in ((5, False), (20, True)):
        with zipfile.ZipFile(inbox / "extra.zip", "w") as archive:
            for i in range(number):  # Python copies the rest of such records for each of them
                entry = zipfile.ZipInfo(f"{i}.png")
                entry.extra = struct.pack("<HH", 0xCAFE, 0) * 16_000
                archive.writestr(entry, b"x")
        if is_refused:
            assert "has too much metadata" in refused(inbox / "extra.zip")
        else:
            assert len(list(contents([str(inbox / "extra.zip")]))) == number
    with zipfile.ZipFile(inbox / "total.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(17):
            archive.writestr(f"{i}.png", bytes(16 * 2**20))
    assert "At most 256 MiB at once" in refused(inbox / "total.zip")
    nested = io.BytesIO()
    with zipfile.ZipFile(nested, "w") as archive:
        archive.writestr("inner.png", b"x")
    with zipfile.ZipFile(inbox / "nest.zip", "w") as archive:
        archive.writestr("nested.zip", nested.getvalue())
        archive.writestr("own.png", b"y")
        archive.writestr("__MACOSX/._own.png", b"added by macOS")
    with zipfile.ZipFile(inbox / "name.zip", "w") as archive:
        archive.writestr("a" * 60_000 + ".png", b"x")
    assert list(contents([str(inbox / "name.zip")])) == [("a" * 196 + ".png", b"x")]
    # However often it is named.
    assert list(contents([str(inbox / "nest.zip")] * 9)) == [("own.png", b"y")]


def test_the_history_takes_only_what_was_made_here(inbox, monkeypatch):
    """Its function can be called with any uploaded file."""
    made = {"model": "m@0123456789ab", "n": "1", "seed": "7", "temperature": "1.0", "kind": "mean"}

    def remembered(**changed):
        text = {f"ade:{key}": value for key, value in (made | changed).items()}
        (inbox / "a.png").write_bytes(write_png(np.zeros((8, 8, 3), np.uint8), text))
        return remember([], str(inbox / "a.png"))[0]

    assert len(remembered()) == 1
    for changed in ({"model": "m"}, {"model": "m" * 1000 + "@0123456789ab"}, {"kind": "x" * 1000}):
        assert remembered(**changed) == gr.skip()
    texts = b"".join(chunk(b"tEXt", b"a\0") for _ in range(300_000))
    (inbox / "b.png").write_bytes(write_png(np.zeros((8, 8, 3), np.uint8))[:33] + texts)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it takes seconds"))
    assert remember([], str(inbox / "b.png"))[0] == gr.skip()


def test_requests_of_many_files_are_bounded(monkeypatch):
    monkeypatch.setattr(page_contents, "BATCH_BYTES", 10)
    sizes = [
        [len(data) for _, data in batch]
        for batch in batches([("a", bytes(n)) for n in (4, 4, 4, 20, 1, 1)])
    ]
    assert sizes == [[4, 4], [4], [20], [1, 1]]
    monkeypatch.undo()
    assert page_contents.BATCH_BYTES <= MAX_BODY_BYTES  # what the service takes in one request
    assert [len(batch) for batch in batches([("a", b"")] * 70)] == [32, 32, 6]
    photograph = write_png(np.zeros((3000, 4000, 3), np.uint8))
    assert [len(batch) for batch in batches([("a", photograph)] * 6)] == [5, 1]


def test_a_png_with_two_sizes_is_not_decoded(inbox):
    """The first header is small; the second, which Pillow uses, is not."""
    values = {"seed": "1", "index": "0", "n": "1", "kind": "mean", "temperature": "1"}
    text = {f"ade:{name}": value for name, value in values.items()}
    pixels = np.zeros((32, 32, 3), np.uint8)
    small, large = write_png(pixels, text), write_png(pixels.repeat(50, 0).repeat(50, 1), text)
    header = slice(8, 33)  # the chunk IHDR
    for data, is_read in ((small, True), (small[:33] + large[header] + large[33:], False)):
        file = inbox / "a.png"
        file.write_bytes(data)
        assert (made_here(data, (32, 32, 3)) is not None) is is_read
        refused = pytest.raises(gr.Error, match="not a PNG file")
        with contextlib.nullcontext() if is_read else refused:
            assert np.array_equal(read_text(str(file))[0], pixels)


def test_a_bomb_leaves_memory_flat(page, tmp_path):
    client = page.client()
    function = function_of(client, "score_many")
    call(client, *score_of(client))
    process, peak, done = psutil.Process(page.process.pid), [0], threading.Event()
    before = process.memory_info().rss

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        for name, declared in (("bomb.zip", 255 * 2**20), ("lie.zip", 1000)):
            zipped = lying_zip(tmp_path / name, "large.png", 255 * 2**20, declared)
            (path,) = upload(client, (name, zipped.read_bytes())).json()
            file = {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
            succeeded, answer = call(
                client, function, [MODEL, [file], None, 0.1, False, 0.01, None]
            )
            assert not succeeded or name == "lie.zip"
            assert name == "lie.zip" or "large.png in bomb.zip is too large" in answer
    finally:
        done.set()
        watching.join()
    assert peak[0] - before < 200 * 2**20, f"{(peak[0] - before) >> 20} MiB more"
    assert call(client, *score_of(client))[0]
