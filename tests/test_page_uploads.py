"""What clients upload to the page: names, quotas, zips and pictures are bounded."""

from __future__ import annotations

import asyncio
import contextlib
import io
import stat
import struct
import threading
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import psutil
import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from PIL import Image

from ade_base.pictures.show import write_png
from serving.engine.bundle import open_bundle
from serving.ingest.requests import MAX_BODY_BYTES
from serving.page import contents as page_contents
from serving.page import uploads
from serving.page.app import PageServer, make_app
from serving.page.contents import batches, contents
from serving.page.files import RequestRefused
from serving.page.history import remember
from serving.page.inputs import made_here
from serving.page.reproduce import read_text
from serving.page.uploads import (
    Quota,
    own_name,
    safe_name,
)
from tests.bombs import chunk
from tests.helpers import PRETRAINED
from tests.running_page import (
    EXAMPLE,
    MODEL,
    RunningPage,
    call,
    function_of,
    lying_zip,
    score_of,
    upload,
)


@pytest.fixture
def page(
    request: pytest.FixtureRequest, page_processes: Callable[[str | None], RunningPage]
) -> RunningPage:
    """A page without a login, unless the test is marked."""
    return page_processes(getattr(request, "param", None))


def test_uploads(page: RunningPage) -> None:
    client = page.client()
    image = EXAMPLE.read_bytes()
    for name in ("evil.war", "evil.html", "evil.svg", "evil.py", "noname", "a.png.exe", ""):
        assert upload(client, (name, b"x")).status_code in (400, 415), name
    answer = upload(
        client,
        ("notes.txt", b"a folder holds them"),
        ("._cat.png", b"so does one of macOS"),
        ("../../cat <b>.PNG", image),
    )
    *dropped, kept = map(Path, answer.json())
    assert (
        not any(path.exists() for path in dropped)
        and kept.read_bytes() == image
        and kept.name == "=2E.=2F..=2Fcat =3Cb=3E.PNG"
    )
    assert kept.parent.parent == page.inbox / "uploads"
    for folder in (kept.parent, kept.parent.parent, page.inbox):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    # A cookie of another service on the host.
    cookies = [*(f"{one.name}={one.value}" for one in client.cookies.jar), "other=Jörg"]
    answer = client.post(
        "/gradio_api/upload",
        files=[("files", ("cat.png", image))],
        headers={"Cookie": "; ".join(cookies).encode()},
    )
    assert answer.status_code == 200
    assert upload(client, ("large.png", bytes(17 * 2**20))).status_code == 413
    assert upload(client, *[("a.png", b"x")] * 1001).status_code == 413
    assert client.post("/gradio_api/upload", content=b"x").status_code == 400
    for body in (
        b"",
        b"--b\r\n",
        b"--b\r\nContent-Disposition: form-data; name=files\r\n\r\nx\r\n--b--",
        b"--b\rx",
        b'--b\r\nContent-Disposition: form-data; name="other"; filename="a.png"\r\n\r\nx\r\n--b--',
        b"--b\r\n" + b"X: " + b"a" * 100_000,
    ):
        for kind in (
            "multipart/form-data; boundary=b",
            "multipart/form-data; boundary=",
            "multipart/form-data",
        ):
            answer = client.post("/gradio_api/upload", content=body, headers={"Content-Type": kind})
            assert answer.status_code in (400, 415), (body[:50], kind)
    chunked = client.post(
        "/gradio_api/upload", content=iter([b"x"]), headers={"Content-Type": "multipart/form-data"}
    )
    assert chunked.status_code == 411
    left = [path for path in (page.inbox / "uploads").iterdir() if not any(path.iterdir())]
    assert left == [], "what was refused is gone"


def test_scoring_uploads_leaves_no_file_for_each(page: RunningPage) -> None:
    client = page.client()
    function = function_of(client, "score_many")
    paths = upload(client, *[(f"{i}.png", EXAMPLE.read_bytes()) for i in range(3)]).json()
    given = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths]
    before = {path for path in page.inbox.iterdir() if path.is_file()}
    for files in ([given, None], [None, given]):
        assert call(client, function, [MODEL, *files, 0.1, False, 0.01, None])[0]
    assert {path for path in page.inbox.iterdir() if path.is_file()} == before


def test_an_upload_above_the_quota_is_refused_and_others_continue(page: RunningPage) -> None:
    client = page.client()
    files = [("files", (f"{i}.png", bytes(15 * 2**20))) for i in range(18)]
    answer = client.post("/gradio_api/upload", files=files)
    assert answer.status_code == 413 and answer.text == "At most 256 MiB at once."
    assert call(client, *score_of(client))[0]


def test_an_upload_may_say_its_length_with_many_zeros() -> None:
    length = (b"content-length", b"0" * 5000 + b"7")
    assert uploads._length(Request({"type": "http", "headers": [length]})) == 7


def test_an_announced_length_is_no_reason_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its room is reserved meanwhile, so that nobody else could upload for an hour."""
    monkeypatch.setattr(uploads, "STALL_S", 0.2)

    async def crumbs() -> AsyncIterator[bytes]:
        yield b'--B\r\nContent-Disposition: form-data; name="files"\r\n\r\n'
        while True:
            await asyncio.sleep(0.05)
            yield b"-"

    headers = {"content-type": "multipart/form-data; boundary=B", "content-length": str(2**28)}
    request: Any = SimpleNamespace(headers=headers, stream=crumbs)
    receiver: Any = SimpleNamespace(callbacks=dict)

    async def upload() -> None:
        async with asyncio.timeout(20):
            await uploads._parse(request, receiver)

    with pytest.raises(RequestRefused, match="too slowly") as refused:
        asyncio.run(upload())
    assert refused.value.status == 408


def test_clients_lose_their_own_oldest_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page says which quota a file that is no longer there may have exceeded."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(uploads, "CLIENT_BYTES", 100)
    monkeypatch.setattr(uploads, "ALL_BYTES", 250)
    monkeypatch.setattr(uploads, "CLIENT_FILES", 3)
    monkeypatch.setattr(uploads, "ALL_FILES", 5)
    quota = Quota()

    def send(client: str, name: str, size: int) -> Path:
        with quota.sending(client, size) as add_file:
            add_file()
            path = tmp_path / name / "a.png"
            path.parent.mkdir()
            path.write_bytes(bytes(size))
        quota.keep(client, [path])
        return path

    first, second = send("a", "1", 60), send("a", "2", 30)
    other = send("b", "3", 90)
    third = send("a", "4", 50)
    assert not first.exists() and second.exists() and third.exists() and other.exists()
    with pytest.raises(gr.Error, match="at most 256 MiB and 4,000 files"):
        list(contents([str(second), str(first)]))
    with pytest.raises(RequestRefused, match="At most"):
        send("a", "5", 101)
    with quota.sending("a", 60), pytest.raises(RequestRefused, match="still under way"):
        send("a", "6", 60)
    send("a", "6", 70)
    send("b", "7", 5)
    with pytest.raises(RequestRefused, match="try again later") as refused:
        send("c", "8", 100)
    assert refused.value.status == 503 and other.exists()
    with pytest.raises(RequestRefused, match="try again later"), quota.sending("c", 85):
        send("b", "8", 95)
    assert other.exists() and (tmp_path / "7" / "a.png").exists(), "nothing lost for a refusal"
    with quota.sending("c", 85), quota.sending("b", 90):
        assert not other.exists(), "its own oldest file makes room"
    for name in ("9", "10", "11"):
        send("c", name, 1)
    with pytest.raises(RequestRefused, match="try again later"):
        send("d", "12", 1)
    assert not (tmp_path / "12").exists()
    monkeypatch.setattr(uploads, "KEPT_S", 0.0)
    send("d", "13", 100)
    assert not (tmp_path / "9").exists(), "it expired"


def test_files_that_arrive_have_a_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand of them take 75 KB, and their sender may withhold the end."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(uploads, "CLIENT_FILES", 3)
    monkeypatch.setattr(uploads, "ALL_FILES", 5)
    part = b"--b\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\nx\r\n"
    headers = {"content-type": "multipart/form-data; boundary=b", "content-length": "1000"}
    quota = Quota()

    def files() -> int:
        return len(list((tmp_path / "uploads").iterdir()))

    async def send(client: str, count: int, *, ends: bool = True) -> int:
        async def body() -> AsyncIterator[bytes]:
            yield part * count
            yield b"--b--" if ends else await asyncio.Future()
            yield b""

        sender = SimpleNamespace(host=client)
        request: Any = SimpleNamespace(headers=headers, stream=body, client=sender)
        return (await uploads.receive(request, quota)).status_code

    async def check() -> None:
        assert await send("a", 2) == 200
        unfinished = [asyncio.create_task(send(name, 2, ends=False)) for name in ("a", "b")]
        async with asyncio.timeout(20):
            while files() != 5:  # the oldest of one is gone
                await asyncio.sleep(0)
        assert [await send("c", 1), await send("a", 2)] == [503, 429]
        for task in unfinished:
            task.cancel()
        await asyncio.wait(unfinished)
        assert files() == 0
        assert [await send(name, 2) for name in "abc"] == [200, 200, 503]

    asyncio.run(check())


def test_a_proxy_on_this_machine_names_the_clients_that_have_a_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else does: one client could take the quotas of many."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(uploads, "CLIENT_BYTES", 1500)  # one upload and its headers
    config = PageServer(make_app("http://127.0.0.1:1", [open_bundle(PRETRAINED)], None), []).config
    config.load()

    def send(sender: str, forwarded_for: str) -> Path:
        page = TestClient(config.loaded_app, "http://127.0.0.1", client=(sender, 50000))
        page.headers["X-Forwarded-For"] = forwarded_for
        (path,) = upload(page, ("a.png", bytes(1000))).json()
        return Path(path)

    for sender, has_both in (("127.0.0.1", True), ("192.0.2.1", False)):
        first = send(sender, "198.51.100.1")
        assert send(sender, "198.51.100.2").exists() and first.exists() is has_both


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("img#1 (2).PNG", "img=231 (2).PNG"),
        ("../../a.png", "=2E.=2F..=2Fa.png"),
        ("..", "=2E."),
        ("._a.png", "=2E_a.png"),
        ("", "file"),
        ("#.png", "=23.png"),
        ("50%=a.png", "50=25=3Da.png"),
        ("<b>é.png", "=3Cb=3Eé.png"),
        ("a" * 300 + ".png", "a" * 196 + ".png"),
        ("a\0\n\x1b[31m.png", "a=00=0A=1B=5B31m.png"),
        ("漢" * 200 + ".png", "漢" * 65 + ".png"),
    ],
)
def test_names_of_uploads(name: str, kept: str) -> None:
    assert safe_name(name) == kept
    assert name.endswith(own_name(f"folder/{kept}")) or not name


@pytest.fixture
def inbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return tmp_path


def test_a_zip_is_unpacked_within_bounds(inbox: Path) -> None:
    def refused(path: Path) -> str:
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


def test_the_history_takes_only_what_was_made_here(
    inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its function can be called with any uploaded file."""
    made = {"model": "m@0123456789ab", "n": "1", "seed": "7", "temperature": "1.0", "kind": "mean"}

    def remembered(**changed: str) -> Any:
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


def test_requests_of_many_files_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_png_with_two_sizes_is_not_decoded(inbox: Path) -> None:
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


def test_a_bomb_leaves_memory_flat(page: RunningPage, tmp_path: Path) -> None:
    client = page.client()
    function = function_of(client, "score_many")
    call(client, *score_of(client))
    process, peak, done = psutil.Process(page.process.pid), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
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
