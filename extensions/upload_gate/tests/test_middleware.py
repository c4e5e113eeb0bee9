"""The middleware in front of a classifier: only accepted images reach it."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from PIL import Image
from starlette.websockets import WebSocket, WebSocketDisconnect

from ade_base.pictures.read import read_image
from ade_base.pictures.show import write_png
from ade_base.ports import free_ports
from extensions.upload_gate import middleware
from extensions.upload_gate.middleware import GateMiddleware
from serving.gate import Gate, GateResult
from serving.ingest.requests import MAX_BODY_BYTES
from tests.helpers import PRETRAINED, ROOT, wait_for
from tests.test_docs import codes_raised_in

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
CAT = ROOT / "serving" / "examples" / "cat.png"
HORSE = CAT.with_name("horse.png")  # which the bundle's classifier recognises
PNG = {"Content-Type": "image/png"}


def app_behind(gate, **options):
    """A classifier that records the requests that reach it."""
    app = FastAPI()
    app.add_middleware(GateMiddleware, gate=gate, **options)
    reached: list[list[GateResult]] = []

    @app.post("/classify")
    async def classify(request: Request) -> dict[str, Any]:
        reached.append(request.state.gate)
        if request.headers["content-type"].startswith("multipart"):
            async with request.form() as form:
                return {"bytes": [len(await value.read()) for _, value in form.multi_items()]}
        return {"bytes": [len(await request.body())]}

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.websocket("/stream")
    async def stream(socket: WebSocket) -> None:
        await socket.accept()

    return TestClient(app), reached


def test_an_accepted_image_reaches_the_classifier_as_it_was_sent(gate):
    client, reached = app_behind(gate)
    cat = CAT.read_bytes()
    assert client.post("/classify", content=cat, headers=PNG).json() == {"bytes": [len(cat)]}
    both = [("a", ("cat.png", cat)), ("b", ("cat.png", cat))]
    assert client.post("/classify", files=both).json() == {"bytes": [len(cat)] * 2}
    assert [[d.decision for d in decisions] for decisions in reached] == [
        ["accept"],
        ["accept", "accept"],
    ]
    assert client.get("/health").json() == "ok"


def test_what_is_refused_never_reaches_the_classifier(gate, exact_only):
    cat, noise = CAT.read_bytes(), write_png(NOISE)
    client, reached = app_behind(gate)
    for content, headers, status, code in (
        (noise, PNG, 422, "not_accepted"),
        (write_png(NOISE.repeat(2, 0).repeat(2, 1)), PNG, 422, "not_accepted"),
        (b"no image", PNG, 422, "not_accepted"),
        (b"", PNG, 422, "not_accepted"),
        (b"{}", {"Content-Type": "application/json"}, 415, "no_image"),
        (cat, {}, 415, "no_image"),
        (b"junk", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "malformed_request"),
        (b"0" * (MAX_BODY_BYTES + 1), PNG, 413, "request_too_large"),
    ):
        answer = client.post("/classify", content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    # An accepted image that is also a form, for an application that follows the other type.
    form = (
        cat
        + b'\r\n--b\r\nContent-Disposition: form-data; name="a"; filename="a.png"\r\n\r\n'
        + noise
        + b"\r\n--b--\r\n"
    )
    other = "multipart/form-data; boundary=b"
    twice = client.post(
        "/classify", content=form, headers=[("Content-Type", "image/png"), ("Content-Type", other)]
    )
    assert twice.status_code == 400 and twice.json()["error"]["code"] == "malformed_request"
    assert (
        client.post(
            "/classify", content=form, headers={"Content-Type": f"image/png, {other}"}
        ).status_code
        == 415
    )
    # A parser that forgives the missing end may find a second file, which was not checked.
    cut = form[form.index(b"--b") :].replace(noise, cat)[: -len(b"--b--\r\n")]
    for content in (cut, cut[: -len(b"\r\n")], cut + b"--b\r\n" + cut[3:-50]):
        answer = client.post("/classify", content=content, headers={"Content-Type": other})
        assert answer.status_code == 400 and "the form cannot be parsed" in answer.text
    whole = cut + b"--b--"
    assert client.post("/classify", content=whole, headers={"Content-Type": other}).is_success
    # Reading any of these would keep the application from answering anybody.
    slow = client.post(
        "/classify", content=whole, headers={"Content-Type": other + "; charset=punycode"}
    )
    assert slow.status_code == 400 and "charset of a form must be utf-8" in slow.text
    long = whole.replace(b'"a.png"', b'"a.png"' + b"; x=1" * 40)
    answer = client.post("/classify", content=long, headers={"Content-Type": other})
    assert answer.status_code == 400 and "at most 32 semicolons" in answer.text
    reached.clear()
    mixed = client.post("/classify", files=[("a", ("a.png", cat)), ("b", ("b.png", noise))])
    assert mixed.status_code == 422 and [
        d["decision"] for d in mixed.json()["error"]["decisions"]
    ] == ["accept", "reject"]
    assert client.post("/classify", data={"image": "text"}, files={}).status_code == 415
    # FastAPI gives an endpoint that takes `bytes = File()` the text of a field, too.
    picture = "P3 2 1 255 0 0 0 255 255 255"
    text = client.post("/classify", files={"a": ("a.png", cat)}, data={"image": picture})
    assert text.status_code == 400 and text.json()["error"]["code"] == "unchecked_field"
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/stream"):
        pass
    larger = write_png(np.asarray(Image.open(CAT)).repeat(2, 0).repeat(2, 1))
    unsure, reached_unsure = app_behind(exact_only)
    answer = unsure.post("/classify", content=larger, headers=PNG)
    assert answer.status_code == 422 and "resized_not_calibrated" in answer.text
    assert reached == reached_unsure == []


def test_decisions_are_those_of_the_request_on_a_server_that_shares_its_state(gate):
    """Some servers give the requests of a connection one state."""
    shared: dict[str, Any] = {}
    seen: list[list[GateResult]] = []

    async def app(scope, receive, send):
        seen.append(scope["state"]["gate"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guarded = GateMiddleware(app, gate=gate)

    async def server(scope, receive, send):
        await guarded({**scope, "state": shared}, receive, send)

    answer = TestClient(server).post("/classify", content=Path(CAT).read_bytes(), headers=PNG)
    assert answer.status_code == 200 and [d.accepted for d in seen[0]] == [True]
    assert not shared


def test_flags_are_explicit_and_errors_are_never_flagged(exact_only):
    larger = write_png(np.asarray(Image.open(CAT)).repeat(2, 0).repeat(2, 1))
    client, reached = app_behind(exact_only, on_no_verdict="flag")
    assert client.post("/classify", content=larger, headers=PNG).status_code == 200
    assert client.post("/classify", content=write_png(NOISE), headers=PNG).status_code == 422
    assert client.post("/classify", content=b"no image", headers=PNG).status_code == 422
    assert [[d.accepted for d in decisions] for decisions in reached] == [[False]]
    client, reached = app_behind(exact_only, on_reject="flag")
    assert client.post("/classify", content=write_png(NOISE), headers=PNG).status_code == 200
    assert client.post("/classify", content=larger, headers=PNG).status_code == 422
    assert reached[0][0].decision == "reject"
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"on_no_verdict": "accept"}, "on_no_verdict must be reject or flag, got 'accept'"),
        ({"waiting": 0}, "waiting must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"calibration": "night"}, "calibration must be a function .* got 'night'"),
        ({"calibration": asyncio.sleep}, "calibration must be a function .* got <function sleep"),
        ({"timeout_s": 0.0}, "timeout_s must be above 0 and finite, got 0.0"),
        ({"timeout_s": float("nan")}, "timeout_s must be above 0"),
        ({"timeout_s": float("inf")}, "timeout_s must be above 0"),
        ({"text_fields": "username"}, "text_fields must be a list of names, got 'username'"),
    )
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            GateMiddleware(FastAPI(), exact_only, **options)


def test_a_request_has_no_more_images_than_the_gate_takes(gate, monkeypatch):
    client, reached = app_behind(gate)
    cat = CAT.read_bytes()
    monkeypatch.setattr("extensions.upload_gate.middleware.MAX_IMAGES", 2)
    monkeypatch.setattr(
        "extensions.upload_gate.middleware.MAX_HELD_BYTES", 0
    )  # which small bodies may exceed
    files = [(f"f{i}", ("cat.png", cat)) for i in range(3)]
    answer = client.post("/classify", files=files)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_many_images")
    monkeypatch.setattr("serving.ingest.requests.MAX_REQUEST_PIXELS", 32 * 32)
    answer = client.post("/classify", files=files[:2])
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert client.post("/classify", files=files[:1]).status_code == 200
    assert len(reached) == 1


def test_bodies_are_bounded_together_and_in_time(gate, monkeypatch):
    app = GateMiddleware(FastAPI(), gate)
    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"image/png")]}
    monkeypatch.setattr("extensions.upload_gate.middleware.MAX_HELD_BYTES", 3000)
    monkeypatch.setattr("extensions.upload_gate.middleware.SMALL_BODY_BYTES", 1000)

    async def ask(*sizes):
        """The status for a body that arrives in parts and never ends."""
        parts = [b"0" * size for size in sizes]
        statuses: list[int] = []

        async def receive():
            if not parts:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": parts.pop(0), "more_body": True}

        async def send(message):
            statuses.append(message.get("status", 0))

        await app(dict(scope), receive, send)
        return statuses[0]

    async def main():
        first = asyncio.create_task(ask(2500))
        await asyncio.sleep(0)
        small = asyncio.create_task(ask(900))
        assert await ask(900, 200) == 503  # the others hold too much
        assert not first.done() and not small.done()
        first.cancel()
        small.cancel()
        await asyncio.gather(first, small, return_exceptions=True)
        monkeypatch.setattr("extensions.upload_gate.middleware.MAX_BODY_S", 0.05)
        assert await ask(2500) == 408  # nothing is held any more

    asyncio.run(main())


def test_reading_the_headers_of_files_blocks_no_other_request(gate, monkeypatch):
    threads: list[threading.Thread] = []

    def pixels(files):
        threads.append(threading.current_thread())
        return 0

    monkeypatch.setattr("extensions.upload_gate.middleware.pixels_to_resize", pixels)
    client, _ = app_behind(gate)
    assert client.post("/classify", content=CAT.read_bytes(), headers=PNG).status_code == 200
    assert [thread.name for thread in threads] == ["gate_0"]


def test_a_gate_that_fails_or_is_slow_lets_nothing_through(gate):
    """The answer is 503, as documented, and the next request succeeds once the gate works."""
    free = threading.Event()

    class Slow:
        def check(self, images, *options):
            free.wait(30)
            return gate.check(images)

    class Broken:
        def check(self, images, *options):
            raise RuntimeError("a secret")

    class Slowest:
        def check(self, images, calibration, seconds):
            return gate.check(images, seconds=-seconds)

    class Silent:
        def check(self, images, *options):
            return []

    for broken in (Broken(), Slowest(), Silent()):
        client, reached = app_behind(broken)
        answer = client.post("/classify", content=CAT.read_bytes(), headers=PNG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "gate_unavailable")
        assert "secret" not in answer.text and reached == []
    client, reached = app_behind(Slow(), timeout_s=3.0, waiting=1)  # half of it to start a thread
    with client:  # one event loop for all requests
        codes = [
            client.post("/classify", content=CAT.read_bytes(), headers=PNG).json()["error"]["code"]
            for _ in range(2)
        ]
        assert codes == ["gate_unavailable", "gate_busy"] and reached == []
        large = client.post("/classify", content=b"0" * (MAX_BODY_BYTES + 1), headers=PNG)
        assert large.json()["error"]["code"] == "gate_busy"  # its body is not read
        free.set()

        def is_answered():
            answer = client.post("/classify", content=CAT.read_bytes(), headers=PNG)
            return answer.status_code == 200

        wait_for(is_answered, 60)
        assert reached[0][0].accepted


def test_a_form_that_the_disk_has_no_room_for_is_not_the_clients_error(gate, monkeypatch):
    def fail(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    client, reached = app_behind(gate)
    monkeypatch.setattr(SpooledTemporaryFile, "rollover", fail)
    answer = client.post("/classify", files={"a": ("a.png", bytes(2 * 2**20))})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "gate_unavailable"
    assert reached == []


def test_overload_leaves_some_requests_their_answers():
    """Requests that wait too long are not decided on, so that those behind them are in time."""
    free, checked = threading.Event(), []

    class Busy:
        def check(self, images, *options):
            checked.append(images)
            free.wait(60)
            return [GateResult("accept", 0.5, 3.0)] * len(images)

    client, reached = app_behind(Busy(), timeout_s=4.0)

    def ask(number):
        return client.post("/classify", content=b"%d" % number, headers=PNG).status_code

    with client, ThreadPoolExecutor(8) as pool:
        statuses = [request.result() for request in [pool.submit(ask, i) for i in range(7)]]
        assert statuses == [503] * 7 and len(checked) == 1  # the first one is still decided on
        free.set()
        assert ask(7) == 200
    assert checked[1:] == [[b"7"]] and len(reached) == 1


def test_a_body_that_arrives_late_finds_no_room_that_others_have_taken():
    checking, free = threading.Event(), threading.Event()

    class Busy:
        def check(self, images, *options):
            checking.set()
            free.wait(30)
            return [GateResult("accept", 0.5, 3.0)]

    app = GateMiddleware(FastAPI(), Busy(), waiting=1, timeout_s=20.0)  # type: ignore[arg-type]
    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"image/png")]}

    async def ask(arrived):
        sent: list[bytes] = []

        async def receive():
            await arrived.wait()
            return {"type": "http.request", "body": b"image"}

        async def send(message):
            sent.append(message.get("body", b""))

        await app(dict(scope), receive, send)
        return b"".join(sent)

    async def main():
        now, later = asyncio.Event(), asyncio.Event()
        now.set()
        late = asyncio.create_task(ask(later))
        early = asyncio.create_task(ask(now))
        assert await asyncio.to_thread(checking.wait, 30)
        later.set()
        assert b"gate_busy" in await late
        early.cancel()
        free.set()

    asyncio.run(main())


def test_a_thread_that_cannot_be_started_takes_no_place_for_good(monkeypatch):
    class Quick:
        def check(self, images, *options):
            return [GateResult("accept", 0.5, 3.0)]

    client, reached = app_behind(Quick(), waiting=1)

    def ask():
        return client.post("/classify", content=b"image", headers=PNG).status_code

    def full(*work):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", full)
        assert [ask(), ask()] == [503, 503] and reached == []
    assert ask() == 200 and len(reached) == 1


def documented():
    """The how-to's programs: service, upload form, the gate by itself."""
    page = (ROOT / "docs" / "how-to" / "gate-before-a-classifier.md").read_text()
    return re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def documented_service():
    """The first of them, with more time for a decision: a busy machine needs it."""
    service = documented()[0]
    assert service.count("timeout_s=2)") == 1
    return service.replace("timeout_s=2)", "timeout_s=30)")


class Watched:
    """A classifier that notes what it gets."""

    def __init__(self, classifier):
        self.seen: list[np.ndarray] = []
        self._classifier = classifier

    def run(self, names, inputs):
        self.seen.append(inputs["images"][0])
        return self._classifier.run(names, inputs)


def test_the_documented_service(monkeypatch, capsys):
    """An ID image is classified, an OOD image is not, and if the gate fails no image is."""
    monkeypatch.chdir(ROOT)
    *_, in_process = documented()
    names: dict[str, Any] = {}
    exec(compile(documented_service(), "service.py", "exec"), names)
    watched = names["classifier"] = Watched(names["classifier"])
    client = TestClient(names["app"])
    horse = np.asarray(Image.open(HORSE).convert("RGB"))
    answer = client.post("/classify", content=HORSE.read_bytes(), headers=PNG)
    assert answer.status_code == 200 and answer.json()["label"] == "horse"
    assert answer.json()["p_value"] > 0.01 and np.array_equal(watched.seen.pop(), horse)
    larger = write_png(
        np.asarray(Image.fromarray(horse).resize((80, 64), Image.Resampling.BICUBIC))
    )
    answer = client.post("/classify", content=larger, headers=PNG)
    assert answer.status_code == 200 and watched.seen.pop().shape == (32, 32, 3)
    answer = client.post("/classify", content=write_png(NOISE), headers=PNG)
    assert (
        answer.status_code == 422 and answer.json()["error"]["decisions"][0]["decision"] == "reject"
    )
    hidden = np.dstack([horse, np.full((32, 32), 255, np.uint8)])
    hidden[:4] = 0, 0, 255, 0  # blue without alpha; the gate sees white, and so does the classifier
    file = io.BytesIO()
    Image.fromarray(hidden).save(file, "PNG")
    answer = client.post("/classify", content=file.getvalue(), headers=PNG)
    assert answer.status_code == 200 and (watched.seen.pop()[:4] == 255).all()
    monkeypatch.setattr(Gate, "check", lambda self, images: 1 / 0)
    answer = client.post("/classify", content=HORSE.read_bytes(), headers=PNG)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "gate_unavailable"
    assert answer.headers["retry-after"] == "1" and watched.seen == []
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    exec(compile(in_process, "gate.py", "exec"), {})
    (cat,) = Gate("pretrained/cifar10", alpha=0.01).check(CAT)
    expected = ("True accept", cat.p_value, cat.bpd, "None\n")
    assert capsys.readouterr().out.startswith(" ".join(map(str, expected)))


def test_the_documented_upload_form(tmp_path, monkeypatch):
    """The gate guards the uploads alone: the site's other forms have no images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    names: dict[str, Any] = {}
    exec(documented()[1], names)
    site = names["site"]
    site.post("/log-in")(lambda: "welcome")
    client = TestClient(site)
    assert client.post("/log-in", data={"user": "me"}).json() == "welcome"
    for image, status in ((HORSE.read_bytes(), 200), (write_png(NOISE), 422)):
        form = {"data": {"title": "mine"}, "files": {"image": image}}
        assert client.post("/upload/photo", **form).status_code == status
    assert client.post("/upload/photo", data={"title": "mine"}).status_code == 415
    (kept,) = tmp_path.glob("*.png")
    horse = read_image(HORSE.read_bytes()).pixels
    assert np.array_equal(read_image(kept.read_bytes()).pixels, horse)


def test_the_documented_service_dies_with_its_gate(tmp_path):
    """As a process of its own: once killed, it answers nothing; started again, it classifies."""
    (tmp_path / "service.py").write_text(documented_service())

    def start():
        (port,) = free_ports(1)
        command = [sys.executable, "-m", "uvicorn", "--app-dir", str(tmp_path), "service:app"]
        process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT)
        url = f"http://127.0.0.1:{port}/classify"
        for _ in range(1000):
            try:
                httpx.get(url, timeout=5)
                return process, url
            except httpx.TransportError:
                assert process.poll() is None
                time.sleep(0.2)
        raise RuntimeError("the service did not start")

    for _ in range(2):
        process, url = start()
        try:
            answer = httpx.post(url, content=HORSE.read_bytes(), headers=PNG, timeout=60)
            assert answer.status_code == 200 and answer.json()["label"] == "horse"
            assert httpx.post(url, content=write_png(NOISE), headers=PNG).status_code == 422
        finally:
            process.kill()
            process.wait()
        with pytest.raises(httpx.TransportError):
            httpx.post(url, content=HORSE.read_bytes(), headers=PNG)


def test_the_documented_torchserve_handler(monkeypatch, tmp_path):
    """Loaded and called by the code of TorchServe's worker: each image has its own status."""
    loader = pytest.importorskip("ts.model_loader")
    examples = ROOT / "docs" / "how-to" / "examples"
    shutil.copy(examples / "gated.py", tmp_path)
    shutil.copy(PRETRAINED / "features.onnx", tmp_path / "classifier.onnx")
    options = (examples / "gated.yaml").read_text()
    (tmp_path / "gated.yaml").write_text(options.replace("/srv/bundles/mine", str(PRETRAINED)))
    (tmp_path / "MAR-INF").mkdir()
    manifest = {"model": {"configFile": "gated.yaml"}}
    (tmp_path / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    monkeypatch.syspath_prepend(tmp_path)
    service = loader.TsModelLoader().load("classify", str(tmp_path), "gated.py", None, 8)

    def ask(*bodies):
        context = service.context
        context.request_processor = [RequestProcessor({}) for _ in bodies]
        answers = service._entry_point([{"body": body} for body in bodies], context)
        statuses = [context.get_response_status(row)[0] for row in range(len(bodies))]
        return list(zip(statuses, map(json.loads, answers), strict=True))

    from ts.context import RequestProcessor

    horse = HORSE.read_bytes()
    accepted, rejected, unusable, parsed = ask(horse, bytearray(write_png(NOISE)), b"", {"a": 1})
    assert accepted[0] == 200 and accepted[1]["label"] == "horse" and accepted[1]["p_value"] > 0.01
    assert rejected == (422, {"error": "reject", "reason": None})
    assert unusable[0] == parsed[0] == 422 and unusable[1]["error"] == "no_verdict"
    monkeypatch.setattr(Gate, "check", lambda self, images: 1 / 0)
    assert ask(horse, horse) == [(503, {"error": "unavailable"})] * 2
    monkeypatch.setattr(Gate, "check", lambda self, images: [])
    assert ask(horse) == [(503, {"error": "unavailable"})]


def test_the_middleware_asks_for_a_calibration_by_request(gate):
    """Here by a header. An unknown name is refused with a list of the known ones."""
    client, reached = app_behind(
        gate,
        calibration=lambda scope: dict(scope["headers"]).get(b"x-camera", b"default").decode(),
    )
    cat = CAT.read_bytes()
    assert client.post("/classify", content=cat, headers=PNG).status_code == 200
    label = reached[0][0].calibration
    assert label is not None and label["name"] == "default" and len(label["version"]) == 12
    answer = client.post("/classify", content=cat, headers={**PNG, "X-Camera": "camera-9"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "unknown_calibration")
    assert "there are default" in answer.json()["error"]["message"] and len(reached) == 1


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_the_body_of_a_request_without_images_is_not_passed_on(method):
    """``curl -X GET --data-binary @IMAGE`` must not reach the classifier unchecked."""
    seen = []

    async def app(scope, receive, send):
        seen.append((await receive(), await receive()))

    class Never:
        def check(self, images, *options):
            raise AssertionError

    sent = iter(
        [
            {"type": "http.request", "body": b"IMA", "more_body": True},
            {"type": "http.request", "body": b"GE", "more_body": False},
            {"type": "http.disconnect"},
        ]
    )

    async def receive():
        return next(sent)

    async def send(message):
        raise AssertionError

    scope = {"type": "http", "method": method, "headers": [(b"content-type", b"image/png")]}
    asyncio.run(GateMiddleware(app, Never())(scope, receive, send))  # type: ignore[arg-type]
    empty = {"type": "http.request", "body": b"", "more_body": False}
    assert seen == [(empty, {"type": "http.disconnect"})]


def test_connections_that_are_not_checked_are_refused(gate):
    async def app(*_):
        raise AssertionError("it was reached")

    with pytest.raises(RuntimeError, match="does not check connections of the type webtransport"):
        asyncio.run(GateMiddleware(app, gate)({"type": "webtransport"}, None, None))  # type: ignore[arg-type]


def test_the_page_names_every_error():
    codes = codes_raised_in([Path(middleware.__file__)])
    page = (ROOT / "docs" / "how-to" / "gate-before-a-classifier.md").read_text()
    assert len(codes) > 8 and not {code for code in codes if f"`{code}`" not in page}
