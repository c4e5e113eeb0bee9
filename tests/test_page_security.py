"""Attacks on the page: they are rejected, and the page still answers afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import functools
import io
import json
import math
import os
import secrets
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import httpx
import numpy as np
import psutil
import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from PIL import Image

from ade_base.pictures.show import write_png
from ade_base.ports import free_ports
from ade_base.tables import FORMULA_STARTS, safe_cell, write_csv
from serving.engine.bundle import open_bundle
from serving.ingest.requests import MAX_BODY_BYTES
from serving.page import app as page_app
from serving.page import tab_many, uploads
from serving.page.app import PageServer, gradio_of, make_app
from serving.page.files import KEPT_S, FileRefused, read_file, write_file
from serving.page.reproduce import read_text
from serving.page.routes import LOGGED_OUT, MAX_UNREAD, route_of
from serving.page.served import Runs, made_here
from serving.page.tab_many import batches, contents
from serving.page.tab_sample import remember
from serving.page.uploads import (
    CLIENT_FILES,
    TOO_MANY,
    Quota,
    UploadRefused,
    own_name,
    safe_name,
)
from tests.bombs import chunk
from tests.helpers import PRETRAINED, ROOT, wait_for
from tests.service import RunningService

EXAMPLE = ROOT / "serving" / "examples" / "cat.png"
SECRET = "what-nobody-may-read"
TOKEN = "a-token-of-the-tests"
# Inputs of these kinds take no file. All others are attacked, including those of a new tab.
PLAIN = {"button", "checkbox", "dataset", "dropdown", "number", "radio", "slider", "state"}


class RunningPage:
    """The page without the API, as the launcher starts it: process, folder and output."""

    def __init__(self, url: str, folder: Path, token: str | None = None) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self.inbox, self.output, self.token = folder / "page-files", folder / "page.out", token
        self._clients: list[httpx.Client] = []
        environment = {
            "PATH": os.environ["PATH"],
            "GRADIO_TEMP_DIR": str(self.inbox),
            "OMP_NUM_THREADS": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            "PYTHONPATH": str(ROOT),
        }
        if token is not None:
            environment["ADE_TOKEN"] = token
        with open(self.output, "wb") as out:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "serving.page.app",
                    str(PRETRAINED),
                    "--url",
                    url,
                    "--port",
                    str(port),
                    "--allowed-hosts",
                    "pictures.example",
                ],
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_for(self._answers, 120)
        except BaseException:
            self.process.kill()
            raise

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.output.read_text()
        try:
            return httpx.get(self.url).status_code == 200
        except httpx.TransportError:
            return False

    def client(self, **options: Any) -> httpx.Client:
        """A client, logged in if the page requires it. :meth:`stop` closes it."""
        client = httpx.Client(base_url=self.url, timeout=60, **options)
        self._clients.append(client)
        if self.token is not None:
            assert (
                client.post("/login", data={"username": "ade", "password": self.token}).status_code
                == 200
            )
        return client

    def stop(self) -> None:
        for client in self._clients:
            client.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@pytest.fixture(scope="module")
def started(
    service: RunningService, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str | None], RunningPage]]:
    """The page with a token or without, started when a test first needs it."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(token: str | None) -> RunningPage:
            running = RunningPage(service.url, tmp_path_factory.mktemp("page"), token)
            stack.callback(running.stop)
            return running

        yield start


@pytest.fixture
def page(
    request: pytest.FixtureRequest, started: Callable[[str | None], RunningPage]
) -> RunningPage:
    """Without a login, unless the test is marked."""
    return started(getattr(request, "param", None))


login = pytest.mark.parametrize("page", [TOKEN], ids=["login"], indirect=True)
open_or_login = pytest.mark.parametrize("page", [None, TOKEN], ids=["open", "login"], indirect=True)


def test_an_open_tab_does_not_keep_a_stopping_page(tmp_path: Path) -> None:
    running = RunningPage("http://127.0.0.1:1", tmp_path, None)
    try:
        with running.client().stream("GET", "/gradio_api/heartbeat/a-tab") as tab:
            assert next(tab.iter_lines()) == "data: ALIVE"
            running.process.terminate()
            running.process.wait(15)
    finally:
        running.stop()


class Asked(BaseHTTPRequestHandler):
    """A server on this machine to which a request could be forged."""

    paths: list[str] = []

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(SECRET.encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def inner() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Asked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/secret.png"
    server.shutdown()
    server.server_close()


def outside(inbox: Path, folder: Path, inner: str) -> dict[str, str]:
    """Paths that no client may read, by kind; those created for the test are in ``folder``."""
    (folder / "key_file.json").write_text(json.dumps({"management": {"key": SECRET}}))
    (folder / "private.png").write_text(SECRET)
    (folder / "private.png").chmod(0o600)
    os.mkfifo(folder / "fifo.png")
    inbox.mkdir(exist_ok=True)
    for name, target in (("link.png", folder / "private.png"), ("loop.png", inbox / "loop.png")):
        if not (inbox / name).is_symlink():
            (inbox / name).symlink_to(target)
    if not (inbox / "waiting.png").exists():
        os.mkfifo(inbox / "waiting.png")
    return {
        "passwd": "/etc/passwd",
        "environment": "/proc/self/environ",
        "key": str(folder / "key_file.json"),
        "private": str(folder / "private.png"),
        "link": str(inbox / "link.png"),
        "loop": str(inbox / "loop.png"),
        "fifo": str(folder / "fifo.png"),
        "fifo inside": str(inbox / "waiting.png"),
        "zero": "/dev/zero",
        "dots": f"{inbox}/../../../../../../../../etc/passwd",
        "url": inner,
        "file url": "file:///etc/passwd",
        "folder": str(folder),
        "folder inside": str(inbox / "uploads"),
        "the inbox": str(inbox),
        "nothing": str(folder / "nothing.png"),
        "null": f"{inbox}/a\0b",
        "long": f"{inbox}/{'a' * 5000}",
    }


def shapes(path: str) -> list[Any]:
    """The ways in which components represent a file."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    return [file, {"path": path}, [file, file], [{"image": file, "caption": None}]]


def targets(config: dict[str, Any]) -> list[tuple[int, int, list[Any]]]:
    """Each function and input that takes a file, with usual values of all inputs."""
    components = {one["id"]: one for one in config["components"]}
    found = []
    for function in config["dependencies"]:
        usual = [components[i]["props"].get("value") for i in function["inputs"]]
        found += [
            (function["id"], place, usual)
            for place, i in enumerate(function["inputs"])
            if components[i]["type"] not in PLAIN
        ]
    return found


def call(client: httpx.Client, function: int, data: list[Any]) -> tuple[bool, str]:
    """Whether an event succeeded, and the complete answer."""
    session = secrets.token_hex(8)
    joined = client.post(
        "/gradio_api/queue/join", json={"fn_index": function, "data": data, "session_hash": session}
    )
    if joined.status_code != 200:
        return False, joined.text
    answer = client.get("/gradio_api/queue/data", params={"session_hash": session}).text
    return '"success":true' in answer.replace(" ", ""), answer


def test_no_file_of_the_machine_is_read(page: RunningPage, inner: str, tmp_path: Path) -> None:
    """Tries every file input. The answer does not reveal whether a path exists."""
    client = page.client()
    paths = outside(page.inbox, tmp_path, inner)
    attacked = targets(client.get("/config").json())
    assert len({function for function, _, _ in attacked}) >= 12, "the tabs' inputs are found"
    answers = set()
    for function, place, usual in attacked:
        for name, path in paths.items():
            for shape in shapes(path):
                succeeded, answer = call(
                    client, function, [*usual[:place], shape, *usual[place + 1 :]]
                )
                assert not succeeded, (function, name, answer)
                answers.add(answer)
        succeeded, answer = call(
            client, function, [*usual[:place], paths["private"], *usual[place + 1 :]]
        )
        assert not succeeded and SECRET not in answer and str(tmp_path) not in answer, function
    (answer,) = {json.loads(answer)["detail"] for answer in answers}
    assert answer.startswith("The page opens only files that were dropped on it or made by it.")
    assert answer.endswith("reload the page.")  # of a page before a restart of the service
    for name, path in paths.items():
        for address in (path, path.replace("/", "%2f"), path.replace("..", "%2e%2e")):
            got = client.get("/gradio_api/file=" + address.replace("\0", "%00"))
            assert (
                got.status_code in (403, 404) and SECRET not in got.text and "root:" not in got.text
            ), name
    assert Asked.paths == [], "the page asks no address that a client names"
    assert call(client, *score_of(client))[0], "the page still answers"


def score_of(client: httpx.Client) -> tuple[int, list[Any]]:
    """The request that scores an uploaded example."""
    (path,) = client.post(
        "/gradio_api/upload", files=[("files", ("cat.png", EXAMPLE.read_bytes()))]
    ).json()
    function = next(
        f for f in client.get("/config").json()["dependencies"] if f["api_name"] == "score"
    )
    return function["id"], [
        "cifar10-av-ade",
        {"path": path, "meta": {"_type": "gradio.FileData"}},
        1,
        0.01,
        False,
        None,  # the session's runs, which the server fills in
    ]


def test_gradio_by_itself_checks_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    """Fails if a new version of Gradio no longer checks ``has_launched``."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "inbox"))
    outer = tmp_path / "outer"
    outer.mkdir()
    paths = outside(tmp_path / "inbox", outer, inner)
    with TestClient(make_app("http://127.0.0.1:1", [open_bundle(PRETRAINED)], None)) as client:
        config = client.get("/config").json()
        pick = next(f["id"] for f in config["dependencies"] if f["api_name"] == "pick")
        for name in ("passwd", "environment", "key", "private", "dots", "zero"):
            path = paths[name]
            session = secrets.token_hex(8)
            body = {
                "fn_index": pick,
                "data": [[{"image": shapes(path)[0], "caption": None}]],
                "session_hash": session,
                "event_data": {"index": 0, "value": None},
            }
            assert client.post("/gradio_api/queue/join", json=body).status_code == 200
            answer = client.get("/gradio_api/queue/data", params={"session_hash": session}).text
            assert '"success":false' in answer and str(outer) not in answer, name
            assert client.get(f"/gradio_api/file={path}").status_code in (403, 404), name


def test_our_own_code_reads_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "inbox"))
    outer = tmp_path / "outer"
    outer.mkdir()
    refused = set()
    write_file(b"", "first.png")
    (tmp_path / "inbox" / "uploads").mkdir()
    for name, path in outside(tmp_path / "inbox", outer, inner).items():
        with pytest.raises((FileRefused, FileNotFoundError)) as error:
            read_file(path)
        refused.add(str(error.value))
        assert isinstance(error.value, FileRefused), name
    assert len(refused) == 1
    own = write_file(b"a picture", "picture.png")
    assert (
        read_file(own) == b"a picture"
        and stat.S_IMODE((tmp_path / "inbox").stat().st_mode) == 0o700
    )
    os.truncate(own, 2**40)  # a hole, which takes no disk
    with pytest.raises(FileRefused, match="16 MiB"):
        read_file(own)
    Path(own).unlink()
    with pytest.raises(FileNotFoundError):
        read_file(own)


@open_or_login
@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example:80"},
    ],
)
def test_other_sites_are_refused(page: RunningPage, headers: dict[str, str]) -> None:
    before = sorted(path.name for path in (page.inbox / "uploads").iterdir())
    client = page.client()
    requests = [
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/login"),
    ]
    if "Host" in headers:
        requests += [
            ("GET", path) for path in ("/", "/config", "/readyz", "/openapi.json", "/theme.css")
        ]
    for method, path in requests:
        files = [("files", ("evil.png", EXAMPLE.read_bytes()))] if path.endswith("upload") else None
        answer = client.request(method, path, files=files, headers=headers)
        assert answer.status_code in (403, 421) and "av-ade" not in answer.text, (
            method,
            path,
            answer.text,
        )
    assert client.get("/readyz", headers={"Host": "pictures.example"}).status_code == 200
    assert sorted(path.name for path in (page.inbox / "uploads").iterdir()) == before


@login
def test_without_login_nothing_is_kept(page: RunningPage) -> None:
    """And an answer reveals only that there is a login."""
    for cookies in ({}, {"access-token-unsecure": "x"}):
        with httpx.Client(base_url=page.url, cookies=cookies) as client:
            files = [("files", ("cat.png", EXAMPLE.read_bytes()))]
            answer = client.post("/gradio_api/upload", files=files)
            assert answer.status_code == 401 and answer.text == LOGGED_OUT
            for path in (
                "/config",
                "/gradio_api/info",
                f"/gradio_api/file={page.inbox}",
                "/gradio_api/queue/data?session_hash=a",
            ):
                answer = client.get(path)
                assert answer.status_code in (401, 403) and "cifar" not in answer.text, path
            for path in ("queue/join", "call/about", "run/predict"):
                event = {"data": [], "fn_index": 0, "session_hash": "a"}
                answer = client.post(f"/gradio_api/{path}", json=event)
                assert answer.status_code == 401
                assert answer.json() == {"detail": LOGGED_OUT}  # an open tab shows no object
            assert (
                client.post("/login", data={"username": "ade", "password": "wrong"}).status_code
                == 400
            )


@open_or_login
def test_only_what_the_page_uses_is_open(page: RunningPage) -> None:
    """New routes of a new version of Gradio stay closed, because open ones are listed."""
    client = page.client()
    for path in (
        "proxy=http://127.0.0.1:1/",
        "component_server",
        "process_recording",
        "stream/a/b/c/playlist.m3u8",
        "token",
        "dev/reload",
        "custom_component/a/client/b/c",
        "runs",
        "run-history/buckets",
        "vibe-code",
        "deep_link",
        "upload_progress?upload_id=a",
        "openapi.json",
        "queue/status",
        "file/etc/passwd",
        "user",
    ):
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            assert client.request(method, f"/gradio_api/{path}").status_code == 404, path
    for path in (
        "/monitoring",
        "/monitoring/summary",
        "/monitoring/key",
        "/?deep_link=a",
        "/config?deep_link=a",
        "/?deep%5flink=a",
        "/config?%64eep_link=a",
        "/docs",
        "/logout",
        "/pwa_icon",
        "/robots.txt",
    ):
        assert client.get(path).status_code == 404, path
    assert route_of("GET", "/gradio_api/upload") is None and route_of("HEAD", "/") == "/"


@open_or_login
@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://127.0.0.1:3000", "null", "https://evil.example"]
)
def test_pages_of_other_origins_cannot_read(page: RunningPage, origin: str) -> None:
    for path in (
        "/",
        "/config",
        "/readyz",
        "/gradio_api/info",
        "/gradio_api/queue/data?session_hash=a",
    ):
        answer = page.client().get(path, headers={"Origin": origin})
        assert not [name for name in answer.headers if name.startswith("access-control-")], (
            path,
            answer.headers,
        )


@open_or_login
def test_no_answer_names_a_path_of_the_machine(page: RunningPage) -> None:
    """Except for the folder of uploads, which is part of Gradio's URLs of files."""
    client = page.client()
    for path in (
        "/",
        "/config",
        "/gradio_api/info",
        "/theme.css",
        "/openapi.json",
        "/manifest.json",
        "/readyz",
    ):
        text = client.get(path).text.replace(str(page.inbox), "")
        for place in (
            str(ROOT),
            sys.prefix,
            str(Path.home()) + "/",
            str(page.inbox.parent),
            "site-packages",
        ):
            assert place not in text, (path, place)
    assert "access-token" not in client.get("/config").text


@open_or_login
def test_errors_reveal_nothing(page: RunningPage) -> None:
    """Neither answer nor log of an unexpected error has the request or the page's path."""
    client, mark = page.client(), "a-mark-of-the-payload"
    function, data = score_of(client)
    for wrong in (
        [mark, *data[1:]],
        [*data[:2], mark, *data[3:]],
        [data[0], {"path": 7, "orig_name": mark}, *data[2:]],
        [data[0], {"image": {"mark": mark}}, *data[2:]],
        [mark],
    ):
        succeeded, answer = call(client, function, wrong)
        assert (
            not succeeded
            and str(ROOT) not in answer
            and "Traceback" not in answer
            and str(page.inbox) not in answer
        )
    for body in (
        b"{",
        b"[" * 100_000,
        json.dumps({"data": mark}).encode(),
        b"\xff",
        b'{"data": [], "fn_index": 99999}',
    ):
        answer = client.post(
            "/gradio_api/queue/join", content=body, headers={"Content-Type": "application/json"}
        )
        assert all(
            one not in answer.text for one in (str(ROOT), str(page.inbox), "Traceback", 'File "')
        )
    said = page.output.read_text()
    assert (
        mark not in said and "cat.png" not in said and TOKEN not in said and "Traceback" not in said
    )
    assert "an event failed: " in said, "the operator reads where"


def test_an_internal_error_reveals_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))

    def broken(*args: Any) -> str:
        raise RuntimeError(f"{SECRET} at {tmp_path}")

    monkeypatch.setattr(page_app.about, "card", broken)
    monkeypatch.setattr(
        page_app.about,
        "add_tab",
        lambda shared: shared.model.change(broken, None, shared.model, api_name="about"),
    )
    with TestClient(make_app("http://127.0.0.1:1", [open_bundle(PRETRAINED)], None)) as client:
        event = client.post("/gradio_api/call/about", json={"data": []}).json()["event_id"]
        answer = client.get(f"/gradio_api/call/about/{event}").text
    assert "Something went wrong on the page" in answer
    said = "".join(capfd.readouterr()) + caplog.text
    assert "RuntimeError at test_page_security.py" in said
    for text in (answer, said):
        assert SECRET not in text and str(tmp_path) not in text and "Traceback" not in text


def test_sessions_that_are_remembered_are_bounded(
    inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes 0.2 MB even when it is empty."""
    monkeypatch.setattr(page_app, "MAX_SESSIONS", 5)
    app = make_app("http://127.0.0.1:1", [open_bundle(PRETRAINED)], None)
    holder = gradio_of(app).state_holder
    for i in range(9):
        holder[f"session-{i}"]
    assert len(holder.session_data) == 5
    states = [
        block
        for block in gradio_of(app).get_blocks().blocks.values()
        if isinstance(block, gr.State)
    ]
    # A few numbers and names change in place, which Gradio does not count as use.
    others = [state for state in states if not isinstance(state.value, Runs)]
    # A score stays, for another false-alarm rate: it is small without its map.
    times = [state.time_to_live for state in others]
    assert set(times) == {KEPT_S, math.inf} and times.count(math.inf) == 1


def test_answers_that_nobody_reads_do_not_pile_up(page: RunningPage) -> None:
    """Gradio keeps them without a limit, 35 kB per event."""
    client = page.client()
    about = next(
        f for f in client.get("/config").json()["dependencies"] if f["api_name"] == "about"
    )["id"]
    body = {"fn_index": about, "data": ["cifar10-av-ade"], "session_hash": secrets.token_hex(8)}
    answers = [
        client.post("/gradio_api/queue/join", json=body).status_code for _ in range(3 * MAX_UNREAD)
    ]
    assert answers.count(200) <= MAX_UNREAD and 429 in answers
    assert call(client, about, ["cifar10-av-ade"])[0], "another session is not affected"


def test_what_all_sessions_leave_unread_is_bounded(
    inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client may name as many sessions as it likes, or none."""
    monkeypatch.setattr(page_app, "MAX_MESSAGES", 40)
    app = make_app("http://127.0.0.1:1", [open_bundle(PRETRAINED)], None)
    queue = gradio_of(app).get_blocks()._queue
    config = PageServer(app, []).config
    config.load()
    with TestClient(config.loaded_app, "http://127.0.0.1") as client:
        function = next(
            f for f in client.get("/config").json()["dependencies"] if f["api_name"] == "about"
        )["id"]

        def join(session: str | None) -> None:
            body = {"fn_index": function, "data": ["cifar10-av-ade"], "session_hash": session}
            path = "call/about" if session is None else "queue/join"
            assert client.post(f"/gradio_api/{path}", json=body).status_code == 200
            wait_for(lambda: not queue.event_ids_to_events)

        for session in ("first", *map(str, range(20)), *[None] * 20):
            join(session)
            join("used")
            client.get("/gradio_api/queue/data", params={"session_hash": "used"})
        for kept in (queue.pending_event_ids_session, queue.pending_messages_per_session):
            assert "used" in kept and "first" not in kept and len(kept) <= 21


def test_no_client_skips_the_queue(page: RunningPage) -> None:
    client = page.client()
    about = {"data": ["cifar10-av-ade"]}
    assert client.post("/gradio_api/run/about", json=about).status_code == 404
    assert client.post("/gradio_api/call/about", json=about).status_code == 200
    config = client.get("/config").json()
    datasets = {one["id"] for one in config["components"] if one["type"] == "dataset"}
    choose = next(f for f in config["dependencies"] if datasets & set(f["inputs"]))
    event = {"fn_index": choose["id"], "data": [0], "session_hash": "a"}
    assert client.post("/gradio_api/run/predict", json=event).status_code == 200


def test_names_of_sessions_are_bounded(page: RunningPage) -> None:
    client = page.client()
    for route in ("queue/join", "call/about", "run/about", "cancel"):
        for name in ("a" * 100_000, 7, ["a"]):
            answer = client.post(
                f"/gradio_api/{route}", json={"data": [], "fn_index": 0, "session_hash": name}
            )
            assert answer.status_code == 400 and "64 characters" in answer.text, route


@open_or_login
def test_the_form_of_a_login_is_small_and_plain(page: RunningPage) -> None:
    """Gradio reads it in the event loop, by the codec that the client names: in minutes."""
    client = page.client()
    for size, status, reason in ((2**16, 413, "at most 8 KiB"), (100, 400, "must be utf-8")):
        form = b'--b\r\nContent-Disposition: form-data; name="username"\r\n\r\n'
        form += b"a" * size + b"\r\n--b--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=b; charset=punycode"}
        for path in ("/login", "/login/"):
            answer = client.post(path, content=form, headers=kind)
            assert answer.status_code == status and reason in answer.text
    if page.token is not None:  # as the page's own form sends it
        fields = {"username": (None, "ade"), "password": (None, page.token)}
        assert client.post("/login", files=fields).status_code == 200


def test_bodies_are_bounded(page: RunningPage) -> None:
    client = page.client()
    for path in (
        "/gradio_api/queue/join",
        "/gradio_api/call/score",
        "/gradio_api/run/predict",
        "/login",
    ):
        assert client.post(path, content=bytes(3 * 2**20)).status_code == 413, path
    files = [{"path": f"{page.inbox}/{i}"} for i in range(CLIENT_FILES + 1)]
    assert client.post("/gradio_api/call/about", json={"data": [files[1:]]}).status_code == 200
    answer = client.post("/gradio_api/call/about", json={"data": [files]})
    assert answer.status_code == 413
    assert answer.json() == {"detail": TOO_MANY}
    lists = b"[" + b"[]," * 20_000 + b"[]]"
    for body in (lists, bytes(3 * 2**20)):
        answer = client.post("/gradio_api/queue/join", content=body)
        assert answer.status_code == 413 and answer.json()["detail"].endswith(TOO_MANY)
    port = int(page.url.rpartition(":")[2])
    before = set((page.inbox / "uploads").iterdir())
    head = (
        b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n"
        b"Cookie: "
        + "; ".join(f"{c.name}={c.value}" for c in client.cookies.jar).encode()
        + b"\r\n"
        b"Content-Length: 2000000\r\n\r\n--b\r\n"
        b"Content-Disposition: form-data; name=files; filename=a.png\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port)) as sender:
        sender.sendall(head + bytes(1_000_000))
        deadline = time.monotonic() + 10
        while set((page.inbox / "uploads").iterdir()) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert set((page.inbox / "uploads").iterdir()) != before, "it is under way"
    while set((page.inbox / "uploads").iterdir()) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set((page.inbox / "uploads").iterdir()) == before, "what its sender gave up is gone"


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

    with pytest.raises(UploadRefused, match="too slowly") as refused:
        asyncio.run(upload())
    assert refused.value.status == 408


def test_requests_ahead_of_answers_end_their_connection(page: RunningPage) -> None:
    """uvicorn keeps each of them, with a hundred times the memory of its text."""
    port, answers = int(page.url.rpartition(":")[2]), 0
    sender = socket.create_connection(("127.0.0.1", port))
    with sender, contextlib.suppress(ConnectionError):
        sender.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20_000)
        while part := sender.recv(2**16):
            answers += part.count(b"HTTP/1.1 421")
    assert answers < 1000
    assert page.client().get("/").status_code == 200


@pytest.mark.parametrize("line", [b"a:\r\n", b"a" * 1000])
def test_a_head_without_an_end_ends_its_connection(page: RunningPage, line: bytes) -> None:
    """Before the login: uvicorn keeps it, with thirty times the memory of its text."""
    sender = socket.create_connection(("127.0.0.1", int(page.url.rpartition(":")[2])))
    sent = 0
    with sender, contextlib.suppress(ConnectionError):
        sender.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        while sent < 2**24:
            sender.sendall(line * 100)
            sent += 100 * len(line)
    assert sent < 2**24
    assert page.client().get("/").status_code == 200


def test_a_client_does_not_fill_the_log(page: RunningPage) -> None:
    client = page.client()
    before = len(page.output.read_text().splitlines())
    for i in range(20):
        client.post("/gradio_api/call/v2/no%0asuch", json={})
        client.get(f"/gradio_api/call/no/such{i}")
    lines = page.output.read_text().splitlines()[before:]
    assert len(lines) <= 4 and "such" not in "".join(lines), lines


def upload(client: httpx.Client, *files: tuple[str, bytes]) -> httpx.Response:
    return client.post("/gradio_api/upload", files=[("files", file) for file in files])


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
    function = next(
        f for f in client.get("/config").json()["dependencies"] if f["api_name"] == "score_many"
    )["id"]
    paths = upload(client, *[(f"{i}.png", EXAMPLE.read_bytes()) for i in range(3)]).json()
    given = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths]
    before = {path for path in page.inbox.iterdir() if path.is_file()}
    for files in ([given, None], [None, given]):
        assert call(client, function, ["cifar10-av-ade", *files, 0.1, False, 0.01, None])[0]
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
    with pytest.raises(UploadRefused, match="At most"):
        send("a", "5", 101)
    with quota.sending("a", 60), pytest.raises(UploadRefused, match="still under way"):
        send("a", "6", 60)
    send("a", "6", 70)
    send("b", "7", 5)
    with pytest.raises(UploadRefused, match="try again later") as refused:
        send("c", "8", 100)
    assert refused.value.status == 503 and other.exists()
    with pytest.raises(UploadRefused, match="try again later"), quota.sending("c", 85):
        send("b", "8", 95)
    assert other.exists() and (tmp_path / "7" / "a.png").exists(), "nothing lost for a refusal"
    with quota.sending("c", 85), quota.sending("b", 90):
        assert not other.exists(), "its own oldest file makes room"
    for name in ("9", "10", "11"):
        send("c", name, 1)
    with pytest.raises(UploadRefused, match="try again later"):
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


def lying_zip(path: Path, name: str, size: int, declared: int) -> Path:
    """A zip of one entry of ``size`` zeros whose headers declare another size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(size))
    data = path.read_bytes().replace(struct.pack("<I", size), struct.pack("<I", declared))
    path.write_bytes(data)
    return path


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
        for i in range(tab_many.MOST_ENTRIES + 1):
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
    made = {
        "ade:model": "m@0123456789ab",
        "ade:n": "1",
        "ade:seed": "7",
        "ade:temperature": "1.0",
        "ade:kind": "mean",
    }

    def remembered(**changed: str) -> Any:
        text = made | {f"ade:{key}": value for key, value in changed.items()}
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
    monkeypatch.setattr(tab_many, "BATCH_BYTES", 10)
    sizes = [
        [len(data) for _, data in batch]
        for batch in batches([("a", bytes(n)) for n in (4, 4, 4, 20, 1, 1)])
    ]
    assert sizes == [[4, 4], [4], [20], [1, 1]]
    monkeypatch.undo()
    assert tab_many.BATCH_BYTES <= MAX_BODY_BYTES  # what the service takes in one request
    assert [len(batch) for batch in batches([("a", b"")] * 70)] == [32, 32, 6]
    photograph = write_png(np.zeros((3000, 4000, 3), np.uint8))
    assert [len(batch) for batch in batches([("a", photograph)] * 6)] == [5, 1]


def test_a_png_with_two_sizes_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first header is small; the second, which Pillow uses, is not."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    text = {
        "ade:seed": "1",
        "ade:index": "0",
        "ade:n": "1",
        "ade:kind": "mean",
        "ade:temperature": "1",
    }
    pixels = np.zeros((32, 32, 3), np.uint8)
    small, large = write_png(pixels, text), write_png(pixels.repeat(50, 0).repeat(50, 1), text)
    header = slice(8, 33)  # the chunk IHDR
    for data, is_read in ((small, True), (small[:33] + large[header] + large[33:], False)):
        file = tmp_path / "a.png"
        file.write_bytes(data)
        assert (made_here(data, (32, 32, 3)) is not None) is is_read
        refused = pytest.raises(gr.Error, match="not a PNG file")
        with contextlib.nullcontext() if is_read else refused:
            assert np.array_equal(read_text(str(file))[0], pixels)


def test_a_bomb_leaves_memory_flat(page: RunningPage, tmp_path: Path) -> None:
    client = page.client()
    function = next(
        f for f in client.get("/config").json()["dependencies"] if f["api_name"] == "score_many"
    )["id"]
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
                client, function, ["cifar10-av-ade", [file], None, 0.1, False, 0.01, None]
            )
            assert not succeeded or name == "lie.zip"
            assert name == "lie.zip" or "large.png in bomb.zip is too large" in answer
    finally:
        done.set()
        watching.join()
    assert peak[0] - before < 200 * 2**20, f"{(peak[0] - before) >> 20} MiB more"
    assert call(client, *score_of(client))[0]


@pytest.mark.parametrize(
    "name", ["=1+1.png", "+1", "-1", "@SUM(A1)", "\t1", "\r1", "\n1", " =1", "＝1"]
)
def test_spreadsheets_run_no_cell(name: str) -> None:
    assert safe_cell(name) == f"'{name}"
    table = io.StringIO(newline="")
    write_csv(table, ["path", "bpd", "notes"], [{"path": name, "bpd": -1.25, "notes": "=note"}])
    (row,) = csv.DictReader(io.StringIO(table.getvalue(), newline=""))
    assert row == {"path": f"'{name}", "bpd": "-1.25", "notes": "'=note"}, "numbers stay numbers"


@pytest.mark.parametrize("separator", [";", "; ", "\t", "\n", "\r", ';"', ";\t", ";;"])
def test_spreadsheets_that_split_elsewhere_run_no_cell(separator: str) -> None:
    name = f"a{separator}=cmd|'/C calc'!A1;.png"
    table = io.StringIO(newline="")
    write_csv(table, ["path", "notes"], [{"path": name, "notes": f"{name}, as before"}])
    for delimiter in (",", ";", "\t"):
        rows = csv.reader(io.StringIO(table.getvalue(), newline=""), delimiter=delimiter)
        cells = [cell.lstrip(" ") for row in rows for cell in row]
        assert not [cell for cell in cells if cell.startswith(tuple(FORMULA_STARTS))]


@pytest.mark.parametrize(
    "name", ["cat.png", "", "a=1", "folder/-1.png", "'quoted", "a; b", "a;b=1"]
)
def test_other_cells_stay_as_they_are(name: str) -> None:
    assert safe_cell(name) == name
