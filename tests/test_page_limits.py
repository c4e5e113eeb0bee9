"""What a client can make the page keep, read or write is bounded."""

import contextlib
import math
import secrets
import socket
import time

import gradio as gr
import pytest
from fastapi.testclient import TestClient

from serving.engine.bundle import open_bundle
from serving.page import app as page_app
from serving.page.app import PageServer, gradio_of, make_app
from serving.page.files import KEPT_S
from serving.page.routes import MAX_UNREAD
from serving.page.runs import Runs
from serving.page.uploads import CLIENT_FILES, TOO_MANY
from tests.helpers import PRETRAINED, wait_for
from tests.running_page import (
    MODEL,
    call,
    event_of,
    open_or_login,
    page_process,  # noqa: F401
)


@pytest.fixture
def inbox(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return tmp_path


def test_sessions_that_are_remembered_are_bounded(inbox, monkeypatch):
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


def test_answers_that_nobody_reads_do_not_pile_up(page):
    """Gradio keeps them without a limit, 35 kB per event."""
    client = page.client()
    body = event_of(client, "about", secrets.token_hex(8))
    answers = [
        client.post("/gradio_api/queue/join", json=body).status_code for _ in range(3 * MAX_UNREAD)
    ]
    assert answers.count(200) <= MAX_UNREAD and 429 in answers
    assert call(client, body["fn_index"], [MODEL])[0], "another session is not affected"


def test_what_all_sessions_leave_unread_is_bounded(inbox, monkeypatch):
    """A client may name as many sessions as it likes, or none."""
    monkeypatch.setattr(page_app, "MAX_MESSAGES", 40)
    app = make_app("http://127.0.0.1:1", [open_bundle(PRETRAINED)], None)
    queue = gradio_of(app).get_blocks()._queue
    config = PageServer(app, []).config
    config.load()
    with TestClient(config.loaded_app, "http://127.0.0.1") as client:

        def join(session):
            body = event_of(client, "about", session)
            path = "call/about" if session is None else "queue/join"
            assert client.post(f"/gradio_api/{path}", json=body).status_code == 200
            wait_for(lambda: not queue.event_ids_to_events)

        for session in ("first", *map(str, range(20)), *[None] * 20):
            join(session)
            join("used")
            client.get("/gradio_api/queue/data", params={"session_hash": "used"})
        for kept in (queue.pending_event_ids_session, queue.pending_messages_per_session):
            assert "used" in kept and "first" not in kept and len(kept) <= 21


def test_no_client_skips_the_queue(page):
    client = page.client()
    about = {"data": [MODEL]}
    assert client.post("/gradio_api/run/about", json=about).status_code == 404
    assert client.post("/gradio_api/call/about", json=about).status_code == 200
    config = client.get("/config").json()
    datasets = {one["id"] for one in config["components"] if one["type"] == "dataset"}
    choose = next(f for f in config["dependencies"] if datasets & set(f["inputs"]))
    event = {"fn_index": choose["id"], "data": [0], "session_hash": "a"}
    assert client.post("/gradio_api/run/predict", json=event).status_code == 200


def test_names_of_sessions_are_bounded(page):
    client = page.client()
    for route in ("queue/join", "call/about", "run/about", "cancel"):
        for name in ("a" * 100_000, 7, ["a"]):
            answer = client.post(
                f"/gradio_api/{route}", json={"data": [], "fn_index": 0, "session_hash": name}
            )
            assert answer.status_code == 400 and "64 characters" in answer.text, route


@open_or_login
def test_the_form_of_a_login_is_small_and_plain(page):
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


def test_bodies_are_bounded(page):
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


def test_requests_ahead_of_answers_end_their_connection(page):
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
def test_a_head_without_an_end_ends_its_connection(page, line):
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


def test_a_client_does_not_fill_the_log(page):
    client = page.client()
    before = len(page.output.read_text().splitlines())
    for i in range(20):
        client.post("/gradio_api/call/v2/no%0asuch", json={})
        client.get(f"/gradio_api/call/no/such{i}")
    lines = page.output.read_text().splitlines()[before:]
    assert len(lines) <= 4 and "such" not in "".join(lines), lines
