"""The client: what it sends, repeats and makes of answers; the service is not started."""

from __future__ import annotations

import io
import json
import os
import pickle
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import numpy as np
import pytest

from ade_base.ports import Ports
from ade_client.client import MAX_WAIT_S, AdeClient, AdeError, asked_to_wait
from handlers.front.admission import Limits
from handlers.launch.status import read_status
from serving.ingest.errors import ApiError
from tests.helpers import ROOT, b64, npy

EXAMPLE = ROOT / "serving" / "examples" / "cat.png"
IMAGE = np.zeros((32, 32, 3), np.uint8)
Outcome = httpx.Response | httpx.TransportError


@contextmanager
def client_of(*outcomes, retries=5, **options):
    """A client with these outcomes of its requests, the last for ever, and what it has sent."""
    sent: list[httpx.Request] = []

    def answer(request):
        sent.append(request)
        outcome = outcomes[min(len(sent), len(outcomes)) - 1]
        if isinstance(outcome, httpx.TransportError):
            raise outcome
        return outcome

    with AdeClient("http://127.0.0.1:1", retries=retries, **options) as client:
        client._http = httpx.Client(base_url=client.url, transport=httpx.MockTransport(answer))
        yield client, sent


def ok(content=b"a picture"):
    headers = {"X-Ade-Seed": "1", "X-Ade-Model": "x@1"}
    return httpx.Response(200, headers=headers, content=content)


def problem(status, code):
    return httpx.Response(status, json={"error": {"code": code, "message": "m"}})


def npz(**arrays):
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


CALLS: dict[str, Callable[[AdeClient], object]] = {
    "sample": lambda client: client.sample(1),
    "sample_png": lambda client: client.sample_png(n=1),
    "encode": lambda client: client.encode(IMAGE),
    "reconstruct": lambda client: client.reconstruct(IMAGE),
    "score": lambda client: client.score(IMAGE),
    "score_group": lambda client: client.score_group(IMAGE[None]),
    "encode two": lambda client: client.encode([IMAGE, IMAGE]),
    "decode two": lambda client: client.decode([np.zeros((2, 1, 2, 2), np.float32)]),
}
LATENTS = {f"{name}_0": np.zeros((1, 1, 2, 2)) for name in ("mean", "log_scale", "z")}


@pytest.mark.parametrize(
    "answer, calls, message",
    [
        # A proxy's or another program's, in particular one with fewer results than images, which
        # callers pair with their files.
        *(
            (httpx.Response(200, content=body), list(CALLS)[:6], "the answer is not this API's")
            for body in (b"<html>", b"{}", b"[]", b"null", b'{"results": []}', b"PK\3\4")
        ),
        *(
            (ok(body), ["sample", "encode"], "the answer is not this API's")
            for body in (npz(arr_0=IMAGE[None]), npy(np.zeros(1)), npy(IMAGE))
        ),
        (ok(npz(**LATENTS)), ["encode two"], "it has 1 results of 2 images"),
        (ok(npy(IMAGE[None])), ["decode two"], "it has 1 results of 2 images"),
        (httpx.Response(502, content=b'{"error": null}'), ["sample"], "502"),
        (httpx.Response(502, content=b"<html>"), ["sample"], "502"),
    ],
)
def test_answers_that_are_not_the_apis_are_errors(answer, calls, message):
    for name in calls:
        with client_of(answer, retries=0) as (client, _):
            with pytest.raises(AdeError, match=message) as caught:
                CALLS[name](client)
            assert (caught.value.status, caught.value.code) == (answer.status_code, "server_error")


def test_an_error_of_one_image_has_the_status_that_it_would_have_alone():
    error = {"error": {"code": "not_an_image", "message": "the data is not an image"}}
    about = {"model": "m", "estimator": "elbo", "samples": 1, "alpha": 0.01}
    with client_of(httpx.Response(200, json={**about, "results": [error] * 2})) as (client, _):
        found = client.score(np.stack([IMAGE] * 2))
    assert [str(error) for error in found] == ["the data is not an image (415 not_an_image)"] * 2


def test_an_empty_identity_does_not_mean_any_model():
    with pytest.raises(ValueError, match="identity must name a model"):
        AdeClient(identity="")


@contextmanager
def other_program(status, body, **headers):
    """The address of a server with one answer to everything, after 0.1 s."""

    class Other(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            time.sleep(0.1)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for header, value in headers.items():
                self.send_header(header.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        # Polls often, because shutdown waits for the next poll.
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_answer_that_cannot_be_decoded_is_none():
    with other_program(200, b"junk", Content_Encoding="gzip") as url, AdeClient(url) as client:
        assert not client.is_ready()
        with pytest.raises(httpx.TransportError, match="the answer cannot be decoded"):
            client.sample(1)


def test_another_program_is_not_ready():
    with other_program(200, b"<html>") as url:
        port = int(url.rpartition(":")[2])
        assert not read_status(Ports(inference=port, metrics=port, ui=port))["ready"]
        with AdeClient(url) as client:
            assert not client.is_ready()


def test_all_operations_have_the_time_to_be_ready_together():
    with other_program(200, b"", X_Ade_Model="x@1") as url, AdeClient(url) as client:
        assert client.is_ready() and not client.is_ready(timeout=0.25)


@pytest.mark.parametrize(
    "answer, is_ready",
    [
        (problem(503, "overloaded"), True),
        (problem(422, "not_available"), True),
        (problem(503, "unavailable"), False),
        (httpx.Response(503, content=b"<html>"), False),  # a proxy's, which has no service
        (ok(b""), True),
    ],
)
def test_an_overloaded_service_is_ready(answer, is_ready):
    """Otherwise overload would take every replica out of service. No request is repeated."""
    with client_of(answer, ok(b"")) as (client, sent):
        assert client.is_ready() == is_ready and len(sent) == (4 if is_ready else 1)


@pytest.fixture
def pauses(monkeypatch):
    """The pauses of clients, which do not last."""
    found: list[float] = []
    monkeypatch.setattr("ade_client.client.time.sleep", found.append)
    return found


ADVISED = httpx.Response(507, headers={"Retry-After": "7"})
LATER = [
    *(httpx.ConnectError("refused"), httpx.ReadError("reset"), httpx.WriteError("reset")),
    httpx.RemoteProtocolError("disconnected"),
    httpx.Response(500, text="a proxy of Ray"),
    httpx.Response(502, text="<html>"),
    httpx.Response(503),
]


def test_the_client_repeats_what_may_succeed_later(pauses):
    """With growing pauses, or those that the answer asks for; so dropped requests, too."""
    with client_of(httpx.Response(429), ADVISED, httpx.Response(503), ok()) as (client, sent):
        assert client.sample_png() == (b"a picture", 1) and len(sent) == 4
    assert pauses == [0.1, 7.0, 0.4]
    for outcome in LATER:
        pauses.clear()
        with client_of(outcome, outcome, ok()) as (client, _):
            assert client.sample_png() == (b"a picture", 1) and pauses == [0.1, 0.2]
        with client_of(outcome, retries=1) as (client, sent):
            with pytest.raises((AdeError, httpx.TransportError)):
                client.sample_png()
            assert len(sent) == 2


def test_the_client_does_not_repeat_what_would_fail_again(pauses):
    """And sends the whole body each time before."""
    dropped = httpx.RemoteProtocolError("disconnected")
    with client_of(dropped, problem(500, "internal_error"), ok()) as (client, sent):
        with pytest.raises(AdeError, match="500 internal_error"):
            client.score(EXAMPLE)
        first, second = (json.loads(request.content)["images"] for request in sent)
    assert first == second == [b64(EXAMPLE.read_bytes())]
    for late in (httpx.ReadTimeout("late"), httpx.Response(504, text="<html>")):
        with client_of(late, ok()) as (client, _), pytest.raises((AdeError, httpx.ReadTimeout)):
            client.sample_png()
    assert pauses == [0.1]


@pytest.mark.parametrize(
    "asked, seconds",
    [
        ("1", 1.0),
        ("86400", MAX_WAIT_S),
        ("Wed, 25 Nov 2026 15:00:00 GMT", None),
        ("", None),
        (None, None),
    ],
)
def test_the_client_waits_as_advised_within_reason(asked, seconds):
    headers = {} if asked is None else {"Retry-After": asked}
    assert asked_to_wait(httpx.Response(503, headers=headers)) == seconds


def test_the_client_waits_as_long_as_the_service():
    """Otherwise it never sees the answer that it may repeat, nor one that came late."""
    limits = Limits()
    with AdeClient() as client:
        assert client._http.timeout.read > limits.waiting_s + limits.upstream_s


def test_the_client_names_a_file_that_cannot_be_read_and_sends_nothing(tmp_path):
    """Nothing listens on port 1: an attempt to send would be another error."""
    good, large = tmp_path / "good.png", tmp_path / "large.png"
    good.write_bytes(EXAMPLE.read_bytes())
    os.mkfifo(tmp_path / "pipe.png")
    with open(large, "wb") as file:
        file.truncate(2**40)
    with AdeClient("http://127.0.0.1:1") as client:
        for name in ("gone.png", "pipe.png", "large.png"):
            for call in (client.score, client.score_group, client.encode, client.reconstruct):
                with pytest.raises(OSError, match=name) as raised:
                    call([good, tmp_path / name])
                assert raised.value.filename == str(tmp_path / name)


@pytest.mark.parametrize(
    "error",
    [
        ApiError(404, "unreadable", "no such file", 3, is_transient=True),
        AdeError(415, "not_an_image", "it is text", 2),
    ],
)
def test_errors_come_back_from_other_processes(error):
    """They stand among the results of a list, which a pool of processes sends."""
    back = pickle.loads(pickle.dumps(error))
    assert vars(back) == vars(error) and str(back) == str(error)
