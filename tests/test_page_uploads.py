"""What clients upload to the page: names, kinds and quotas."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from fastapi import Request
from fastapi.testclient import TestClient

from serving.engine.bundle import open_bundle
from serving.page import uploads
from serving.page.app import PageServer, make_app
from serving.page.contents import contents
from serving.page.files import RequestRefused
from serving.page.uploads import Quota, own_name, safe_name
from tests.helpers import PRETRAINED
from tests.running_page import (
    EXAMPLE,
    MODEL,
    call,
    function_of,
    page_process,  # noqa: F401
    score_of,
    upload,
)


def test_uploads(page):
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
    assert not any(path.exists() for path in dropped) and kept.read_bytes() == image
    assert kept.name == "=2E.=2F..=2Fcat =3Cb=3E.PNG"
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


def test_scoring_uploads_leaves_no_file_for_each(page):
    client = page.client()
    function = function_of(client, "score_many")
    paths = upload(client, *[(f"{i}.png", EXAMPLE.read_bytes()) for i in range(3)]).json()
    given = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths]
    before = {path for path in page.inbox.iterdir() if path.is_file()}
    for files in ([given, None], [None, given]):
        assert call(client, function, [MODEL, *files, 0.1, False, 0.01, None])[0]
    assert {path for path in page.inbox.iterdir() if path.is_file()} == before


def test_an_upload_above_the_quota_is_refused_and_others_continue(page):
    client = page.client()
    files = [("files", (f"{i}.png", bytes(15 * 2**20))) for i in range(18)]
    answer = client.post("/gradio_api/upload", files=files)
    assert answer.status_code == 413 and answer.text == "At most 256 MiB at once."
    assert call(client, *score_of(client))[0]


def test_an_upload_may_say_its_length_with_many_zeros():
    length = (b"content-length", b"0" * 5000 + b"7")
    assert uploads._length(Request({"type": "http", "headers": [length]})) == 7


def test_an_announced_length_is_no_reason_to_wait(monkeypatch):
    """Its room is reserved meanwhile, so that nobody else could upload for an hour."""
    monkeypatch.setattr(uploads, "STALL_S", 0.2)

    async def crumbs():
        yield b'--B\r\nContent-Disposition: form-data; name="files"\r\n\r\n'
        while True:
            await asyncio.sleep(0.05)
            yield b"-"

    headers = {"content-type": "multipart/form-data; boundary=B", "content-length": str(2**28)}
    request: Any = SimpleNamespace(headers=headers, stream=crumbs)
    receiver: Any = SimpleNamespace(callbacks=dict)

    async def upload():
        async with asyncio.timeout(20):
            await uploads._parse(request, receiver)

    with pytest.raises(RequestRefused, match="too slowly") as refused:
        asyncio.run(upload())
    assert refused.value.status == 408


def test_clients_lose_their_own_oldest_files_only(tmp_path, monkeypatch):
    """The page says which quota a file that is no longer there may have exceeded."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(uploads, "CLIENT_BYTES", 100)
    monkeypatch.setattr(uploads, "ALL_BYTES", 250)
    monkeypatch.setattr(uploads, "CLIENT_FILES", 3)
    monkeypatch.setattr(uploads, "ALL_FILES", 5)
    quota = Quota()

    def send(client, name, size):
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


def test_files_that_arrive_have_a_quota(tmp_path, monkeypatch):
    """A thousand of them take 75 KB, and their sender may withhold the end."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(uploads, "CLIENT_FILES", 3)
    monkeypatch.setattr(uploads, "ALL_FILES", 5)
    part = b"--b\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\nx\r\n"
    headers = {"content-type": "multipart/form-data; boundary=b", "content-length": "1000"}
    quota = Quota()

    def files():
        return len(list((tmp_path / "uploads").iterdir()))

    async def send(client, count, *, ends=True):
        async def body():
            yield part * count
            yield b"--b--" if ends else await asyncio.Future()
            yield b""

        sender = SimpleNamespace(host=client)
        request: Any = SimpleNamespace(headers=headers, stream=body, client=sender)
        return (await uploads.receive(request, quota)).status_code

    async def check():
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


def test_a_proxy_on_this_machine_names_the_clients_that_have_a_quota(tmp_path, monkeypatch):
    """Nobody else does: one client could take the quotas of many."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(uploads, "CLIENT_BYTES", 1500)  # one upload and its headers
    config = PageServer(make_app("http://127.0.0.1:1", [open_bundle(PRETRAINED)], None), []).config
    config.load()

    def send(sender, forwarded_for):
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
def test_names_of_uploads(name, kept):
    assert safe_name(name) == kept
    assert name.endswith(own_name(f"folder/{kept}")) or not name
