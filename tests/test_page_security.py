"""Attacks on the page: they are rejected, and the page still answers afterwards."""

import json
import os
import secrets
import stat
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from serving.engine.bundle import open_bundle
from serving.page import app as page_app
from serving.page.app import make_app
from serving.page.files import FileRefused, read_file, write_file
from serving.page.routes import LOGGED_OUT, route_of
from tests.helpers import PRETRAINED, ROOT
from tests.running_page import (
    EXAMPLE,
    SECRET,
    TOKEN,
    Asked,
    RunningPage,
    call,
    open_or_login,
    outside,
    page_process,  # noqa: F401
    score_of,
    shapes,
    targets,
)

login = pytest.mark.parametrize("page", [TOKEN], ids=["login"], indirect=True)


def test_an_open_tab_does_not_keep_a_stopping_page(tmp_path):
    running = RunningPage("http://127.0.0.1:1", tmp_path, None)
    try:
        with running.client().stream("GET", "/gradio_api/heartbeat/a-tab") as tab:
            assert next(tab.iter_lines()) == "data: ALIVE"
            running.process.terminate()
            running.process.wait(15)
    finally:
        running.stop()


@pytest.fixture(scope="module")
def inner():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Asked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/secret.png"
    server.shutdown()
    server.server_close()


def test_no_file_of_the_machine_is_read(page, inner, tmp_path):
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


def test_gradio_by_itself_checks_paths(tmp_path, monkeypatch, inner):
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


def test_our_own_code_reads_no_other_file(tmp_path, monkeypatch, inner):
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
    assert read_file(own) == b"a picture"
    assert stat.S_IMODE((tmp_path / "inbox").stat().st_mode) == 0o700
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
def test_other_sites_are_refused(page, headers):
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
def test_without_login_nothing_is_kept(page):
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


CLOSED_API = """
proxy=http://127.0.0.1:1/ component_server process_recording stream/a/b/c/playlist.m3u8 token
dev/reload custom_component/a/client/b/c runs run-history/buckets vibe-code deep_link
upload_progress?upload_id=a openapi.json queue/status file/etc/passwd user
"""


CLOSED = """
/monitoring /monitoring/summary /monitoring/key /?deep_link=a /config?deep_link=a /?deep%5flink=a
/config?%64eep_link=a /docs /logout /pwa_icon /robots.txt
"""


@open_or_login
def test_only_what_the_page_uses_is_open(page):
    """New routes of a new version of Gradio stay closed, because open ones are listed."""
    client = page.client()
    for path in CLOSED_API.split():
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            assert client.request(method, f"/gradio_api/{path}").status_code == 404, path
    for path in CLOSED.split():
        assert client.get(path).status_code == 404, path
    assert route_of("GET", "/gradio_api/upload") is None and route_of("HEAD", "/") == "/"


READABLE = "/ /config /readyz /gradio_api/info /gradio_api/queue/data?session_hash=a"


@open_or_login
@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://127.0.0.1:3000", "null", "https://evil.example"]
)
def test_pages_of_other_origins_cannot_read(page, origin):
    for path in READABLE.split():
        answer = page.client().get(path, headers={"Origin": origin})
        assert not [name for name in answer.headers if name.startswith("access-control-")], (
            path,
            answer.headers,
        )


@open_or_login
def test_no_answer_names_a_path_of_the_machine(page):
    """Except for the folder of uploads, which is part of Gradio's URLs of files."""
    client = page.client()
    places = (str(ROOT), sys.prefix, f"{Path.home()}/", str(page.inbox.parent), "site-packages")
    paths = "/ /config /gradio_api/info /theme.css /openapi.json /manifest.json /readyz"
    for path in paths.split():
        text = client.get(path).text.replace(str(page.inbox), "")
        for place in places:
            assert place not in text, (path, place)
    assert "access-token" not in client.get("/config").text


@open_or_login
def test_errors_reveal_nothing(page):
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
        assert not succeeded and str(ROOT) not in answer and "Traceback" not in answer
        assert str(page.inbox) not in answer
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
    assert mark not in said and "cat.png" not in said and TOKEN not in said
    assert "Traceback" not in said
    assert "an event failed: " in said, "the operator reads where"


def test_an_internal_error_reveals_nothing(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))

    def broken(*args):
        raise RuntimeError(f"{SECRET} at {tmp_path}")

    def about(context):
        context.model.change(broken, None, context.model, api_name="about")

    monkeypatch.setitem(page_app.TABS, "About", about)
    with TestClient(make_app("http://127.0.0.1:1", [open_bundle(PRETRAINED)], None)) as client:
        event = client.post("/gradio_api/call/about", json={"data": []}).json()["event_id"]
        answer = client.get(f"/gradio_api/call/about/{event}").text
    assert "Something went wrong on the page" in answer
    said = "".join(capfd.readouterr()) + caplog.text
    assert "RuntimeError at test_page_security.py" in said
    for text in (answer, said):
        assert SECRET not in text and str(tmp_path) not in text and "Traceback" not in text
