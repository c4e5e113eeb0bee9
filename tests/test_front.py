"""The front as a process, in front of an upstream that echoes requests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import http.client
import itertools
import json
import os
import re
import select
import selectors
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from uvicorn.server import ServerState

from ade_base.ports import free_ports
from ade_client.contract import MODEL_HEADER, PROBE_HEADER
from handlers.front.admission import (
    ClientGone,
    InFlightLimit,
    Limits,
    Memory,
    read_body,
    unless_gone,
)
from handlers.front.front import INFERRING, Answer, Endpoint, Front
from handlers.front.settings import FrontSettings
from handlers.service.application import Application
from serving.api.protocol import MAX_FIELDS as HEAD_FIELDS
from serving.api.protocol import BoundedProtocol
from serving.ingest.errors import ApiError
from serving.ingest.forms import MAX_FIELDS
from tests.front import TYPE_HEADER, RunningFront, Upstream
from tests.helpers import ROOT, wait_for

PREDICT = b"POST /predictions/score"
SHORT = {
    "receive_s": 1.5,
    "answer_s": 5.0,
    "connections": 60,
    "body_bytes": 4 * 2**20,
    "memory_bytes": 5 * 2**20,
    "in_flight": (1, 2, 2),
    "waiting": 2,
    "waiting_s": 1.5,
    "upstream_s": 2.5,
}
# The same budgets for clients that have more time: tests of what happens before it is over.
LENIENT = {
    **SHORT,
    "receive_s": 4.0,
    "answer_s": 60.0,
    "waiting_s": 20.0,
    "upstream_s": 20.0,
}
UNREAD = 9 * 2**19  # bytes of an answer: nearly the budget, and more than the sockets' buffers


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    yield from running(tmp_path_factory)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A front with short timeouts."""
    yield from running(tmp_path_factory, SHORT)


@pytest.fixture(scope="module")
def lenient(tmp_path_factory):
    yield from running(tmp_path_factory, LENIENT)


def running(tmp_path_factory, limits=None):
    made = RunningFront(tmp_path_factory.mktemp("front"), limits)
    yield made
    made.stop()
    log = made.log.read_text()
    assert not re.search("Traceback|graceful|secret-of", log), log


@pytest.fixture
def upstream(request):
    """The upstream of the front that the test uses."""
    (name,) = {"front", "short", "lenient"}.intersection(request.fixturenames)
    made = Upstream(request.getfixturevalue(name).socket)
    yield made
    made.stop()


def error_of(answer):
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message"}, body
    assert answer.headers["content-type"] == "application/json"
    return body["error"]["code"]


def answered(connections):
    """Those that have an answer, or are closed."""
    return select.select(connections, [], [], 0)[0]


def head(*fields, line=PREDICT):
    return b"\r\n".join((line + b" HTTP/1.1", b"Host: localhost", *fields, b"", b""))


def message(body=b"", *fields, line=PREDICT):
    return head(*fields, b"Content-Length: %d" % len(body), line=line) + body


WAITING = message(b"", b"Content-Type: test/wait")
PING = message(line=b"GET /ping")
CHUNKED = b"Transfer-Encoding: chunked"


def read_answer(connection):
    """The status and JSON of an answer."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, json.loads(answer.read())


def ask(front, *parts):
    """Send bytes over a connection of their own."""
    with front.connect() as connection:
        for part in parts:
            connection.sendall(part)
        return read_answer(connection)


def is_closed(connection, seconds=5.0):
    """Whether the server closes the connection; further bytes are ignored."""
    connection.settimeout(seconds)
    try:
        while connection.recv(2**16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def post(front, word="", content=b"", timeout=20, **headers):
    """Post a request; ``word`` tells the upstream what to do."""
    return httpx.post(
        f"{front.url}/predictions/score",
        content=content,
        timeout=timeout,
        headers={**({"Content-Type": f"test/{word}"} if word else {}), **headers},
    )


def is_refused(answer, code="overloaded"):
    return (
        answer.status_code == 503
        and error_of(answer) == code
        and answer.headers["retry-after"] == "1"
    )


# Requests that are passed on


def test_a_request_and_its_answer_pass(front, upstream):
    body = bytes(range(256)) * 1000
    given = {"Authorization": "Bearer of-the-client", "Cookie": "a=b", "X-Other": "1"}
    answer = post(front, "echo", body, **given)
    came = answer.json()
    assert (came["method"], came["path"]) == ("POST", "/predictions/score")
    assert answer.status_code == 200 and came["body"].encode("latin-1") == body
    assert {name.lower(): value for name, value in came["headers"]} == {
        "host": "localhost",
        "x-ade-content-type": "test/echo",
        "content-length": str(len(body)),
    }
    headers = dict(answer.headers)
    assert headers["x-ade-model"] == "m@1" and headers["server-timing"] == "parse;dur=1"
    assert headers["content-type"] == "application/json; charset=utf-8"
    assert headers["x-request-id"]


@pytest.mark.parametrize(
    "method, path, seen",
    [
        *((method, "/predictions/tiny-score", method) for method in ("POST", "PUT", "GET")),
        ("HEAD", "/predictions/tiny-score", "GET"),
        *(
            (method, path, None)
            for method in ("GET", "HEAD")
            for path in ("/ping", "/readyz", "/openapi.json", "/v1/openapi.json")
        ),
    ],
)
def test_methods_that_pass(front, upstream, method, path, seen):
    model = "other@1" if seen is None else "tiny@1"
    answer = httpx.request(method, front.url + path, headers={"X-Ade-Model": model})
    assert answer.status_code == 200
    assert not any(TYPE_HEADER in dict(came["headers"]) for came in upstream.seen)
    asked = [(came["method"], came["path"], came["body"]) for came in upstream.seen]
    assert asked == ([] if seen is None else [(seen, path, "")])
    assert (answer.content == b"") == (method == "HEAD")
    assert int(answer.headers["content-length"]) > 0


def num_refusals(front, code):
    text = httpx.get(f"{front.metrics}/metrics").text
    found = re.search(rf'^ade_front_refusals_total{{code="{code}"}} (\d+)$', text, re.MULTILINE)
    return int(found[1]) if found else 0


NOT_FOUND = """
/ /models /models/score /explanations/score /v1/models/score:predict
/wfpredict/x /workflows /api-description /metrics /invocations /predictions /predictions/
/predictions/score/1.0 /predictions/score/ //predictions/score /predictions/../models /Ping /ping/
/predictions/score%2F..%2F..%2Fmodels
"""
REFUSED = [  # status, code, request
    *(
        (404, "not_found", message(line=f"{method} {path}".encode()))
        for path in NOT_FOUND.split()
        for method in ("GET", "POST")
    ),
    *(
        (404, "unknown_model", message(line=b"POST /predictions/" + name))
        for name in (b"other", b"Score", b"score%00")
    ),
    (404, "unknown_model", message(line=b"POST /v1/other")),
    *(
        (405, "not_allowed", message(line=method + path))
        for method in (b"OPTIONS", b"DELETE", b"PATCH", b"TRACE")
        for path in (b" /predictions/score", b" /v1/score", b" /ping", b" /openapi.json")
    ),
    (405, "not_allowed", message(line=b"POST /ping")),
    (412, "other_model", message(b"x", b"X-Ade-Model: other@1")),
    # Engines ignore it: an image would be judged by another calibration than the named one.
    (400, "malformed_request", message(b"x", line=PREDICT + b"?calibration=night")),
    # A path that is only read, some of which need no token.
    (413, "request_too_large", head(b"Content-Length: 100000", line=b"GET /ping")),
    (421, "host_not_allowed", message().replace(b"localhost", b"evil.example")),
    (403, "cross_origin", message(b"{}", b"Origin: http://evil.example")),
    (403, "cross_origin", message(b"{}", b"Origin: null")),
    (403, "cross_origin", message(b"{}", b"Sec-Fetch-Site: cross-site")),
    (400, "malformed_request", message(line=b"GET")),
    (501, "not_implemented", message(line=b"CONNECT localhost:80")),
    *(
        (400, "malformed_request", head(framing) + b"0\r\n\r\n")  # of an ambiguous body
        for framing in (
            b"Content-Length: 2\r\nTransfer-Encoding: chunked",
            b"Content-Length: 2\r\nContent-Length: 3",
            b"Content-Length: -1",
            b"Transfer-Encoding: x",
            b"Content-Length : 2",
        )
    ),
    # Read at once. Each field takes time and memory, however short.
    (431, "headers_too_large", message(b"", b"X-Long: " + b"x" * 70_000)),
    (431, "headers_too_large", message(b"", *[b"a:"] * 200)),
]
ENDING = {400, 431, 501}  # the server's own errors, after which it closes the connection


@pytest.mark.parametrize("status, code, request_", REFUSED, ids=lambda value: str(value)[:60])
def test_a_refused_request_reaches_no_engine_and_is_counted(
    front, upstream, status, code, request_
):
    before = num_refusals(front, code)
    with front.connect() as connection:
        connection.sendall(request_)
        found, body = read_answer(connection)
        is_ours = b"?" in request_
        assert status not in ENDING or is_ours or is_closed(connection)
    assert (found, body["error"]["code"]) == (status, code)
    assert upstream.seen == [] and num_refusals(front, code) == before + 1


@pytest.mark.parametrize(
    "path, allowed",
    [
        ("/predictions/score", "GET, HEAD, POST, PUT"),
        ("/v1/score", "GET, HEAD, POST, PUT"),
        ("/ping", "GET, HEAD"),
        ("/openapi.json", "GET, HEAD"),
    ],
)
def test_the_methods_of_a_path_are_named(front, path, allowed):
    assert httpx.delete(front.url + path).headers["allow"] == allowed


@pytest.mark.parametrize(
    "headers", [{"Host": "ade.example.org"}, {"Origin": "https://ade.example.org"}]
)
def test_a_named_host_is_answered(front, upstream, headers):
    answer = post(front, "text/plain", b"{}", **headers)
    assert answer.status_code == 200
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_metrics_are_read_only(front, upstream):
    assert "process_start_time_seconds" in httpx.get(f"{front.metrics}/metrics?name[]=x").text
    assert httpx.head(f"{front.metrics}/metrics").status_code == 200
    refused = httpx.post(f"{front.metrics}/metrics")
    assert refused.status_code == 405 and error_of(refused) == "not_allowed"
    before = num_refusals(front, "not_found")
    for path in ("/", "/predictions/score", "/ping", "/models"):
        assert httpx.get(front.metrics + path).status_code == 404
    # Not counted: the service asks this port whether the front hangs.
    assert num_refusals(front, "not_found") == before
    foreign = httpx.get(f"{front.metrics}/metrics", headers={"Host": "evil.example"})
    assert foreign.status_code == 421 and upstream.seen == []


def test_only_requests_with_the_secret_are_health_checks(front, upstream):
    for value, is_probe in [
        ("1", False),
        ("secret-of-probe", False),
        ("", False),
        ("secret-of-probes", True),
    ]:
        came = dict(post(front, "echo", **{"X-ADE-Probe": value}).json()["headers"])
        assert came.get("X-Ade-Probe") == ("1" if is_probe else None)


def test_the_api_and_exposed_metrics_require_the_token(tmp_path):
    """Metrics on loopback do not."""
    guarded = RunningFront(tmp_path, token="t" * 43, host="0.0.0.0", exposes_metrics=True)
    upstream = Upstream(guarded.socket)
    exposed = f"http://127.0.0.2:{guarded.metrics_port}/metrics"
    right = {"Authorization": "bearer " + "t" * 43}
    try:
        for value in ("", "Bearer " + "t" * 42):
            answer = post(guarded, Authorization=value)
            assert answer.status_code == 401 and error_of(answer) == "bad_token"
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/ping", "/openapi.json", "/v1/score"):
            assert httpx.get(guarded.url + path).status_code == 401
        assert upstream.seen == [] and num_refusals(guarded, "bad_token") == 5
        came = post(guarded, **right).json()
        assert "Authorization" not in dict(came["headers"])
        assert httpx.get(exposed).status_code == 401
        assert httpx.get(exposed, headers=right).status_code == 200
    finally:
        upstream.stop()
        guarded.stop()


@pytest.mark.parametrize(
    "host, exposes, expected",
    [
        ("0.0.0.0", False, ["127.0.0.1"]),
        ("0.0.0.0", True, ["0.0.0.0"]),
        ("10.0.0.1", True, ["127.0.0.1", "10.0.0.1"]),
        ("localhost", True, ["127.0.0.1"]),
    ],
)
def test_metrics_are_always_on_loopback(host, exposes, expected):
    changed = dataclasses.replace(settings(), host=host, exposes_metrics=exposes)
    assert changed.metrics_hosts == expected


def test_a_workers_error_passes_as_it_is(front, upstream):
    answer = post(front, "ours")
    assert (answer.status_code, error_of(answer)) == (415, "not_an_image")
    assert answer.headers["retry-after"] == "3" and answer.headers["x-request-id"]


def test_a_missing_upstream_is_reported_and_recovers(front):
    for _ in range(3):
        assert is_refused(post(front), "unavailable")
    upstream = Upstream(front.socket)
    assert post(front).status_code == 200
    upstream.stop()
    assert post(front).status_code == 503


# HTTP


def test_only_the_first_of_pipelined_requests_is_answered(front, upstream):
    """However they arrive; then the connection ends, and the client knows what to repeat."""
    for together in (True, False):
        with hang(front, b"first", message(b"2") if together else b"") as connection:
            wait_for(lambda: upstream.num_waiting == 1)
            connection.sendall(message(b"3"))
            upstream.release()
            answer = connection.makefile("rb").read()
        assert re.findall(rb'"body": "(\w*)"', answer) == [b"first"]
        assert answer.count(b"HTTP/1.1 ") == 1 and b"connection: close" in answer


def test_thousands_of_pipelined_requests_end_their_connection(front, upstream):
    """The front would do nothing else while it reads their heads."""
    with front.connect() as connection:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /ping HTTP/1.1\r\n\r\n" * 20_000)
        assert httpx.get(f"{front.url}/ping", timeout=60).status_code == 200
        assert time.monotonic() - started < 20
        with contextlib.suppress(ConnectionError):
            while connection.recv(2**16):
                pass


@pytest.mark.parametrize(
    "status, request_",
    [
        (b"200", PING.replace(b"1.1", b"1.0")),
        (b"200", message(b"x" * 4000).replace(b"1.1", b"1.0")),
        (b"200", message(b"x" * 4000, b"Connection: close")),
        (b"405", message(b"x" * 4000, b"Connection: close", line=b"PATCH /predictions/score")),
    ],
)
def test_http_1_0_and_close(front, upstream, status, request_):
    """The connection ends after the answer: not by a reset, which would lose it."""
    with front.connect() as connection:
        connection.sendall(request_)
        with connection.makefile("rb") as stream:
            lines, _, body = stream.read().partition(b"\r\n\r\n")
    assert lines.startswith(b"HTTP/1.1 " + status) and json.loads(body)


def test_a_length_with_many_zeros(front, upstream):
    assert ask(front, head(b"Content-Length: " + b"0" * 5000 + b"3"), b"abc")[0] == 200
    assert [one["body"] for one in upstream.seen] == ["abc"], upstream.seen


@pytest.mark.parametrize("space", [b" ", b"\t", b" \t "])
def test_spaces_after_a_value_are_not_part_of_it(front, upstream, space):
    request = message(b"", b"X-Ade-Model: m@1").replace(b"\r\n", space + b"\r\n")
    request = request.replace(b"1.1" + space, b"1.1").removesuffix(space + b"\r\n") + b"\r\n"
    assert ask(front, request)[0] == 200


def test_spaces_after_a_length_that_the_server_keeps():
    """As Ray's server does."""

    async def receive():
        return {"type": "http.request", "body": b""}

    limits, scope = Limits(), {"headers": [(b"content-length", b"0 \t")]}
    with Memory(limits).reserve() as share:
        assert asyncio.run(read_body(scope, receive, share, limits)) == b""


def test_a_connection_that_is_reset_leaves_nothing_behind():
    """As does one whose client reads the answer and is gone; its head may have had 64 KiB."""
    alive: list[weakref.ref[BoundedProtocol]] = []

    async def app(scope, receive, send):
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})

    config = uvicorn.Config(app, interface="asgi3", log_config=None, timeout_keep_alive=1000)

    def make():
        made = BoundedProtocol(Limits(), Counter(), Counter(), config, ServerState(), {})
        alive.append(weakref.ref(made))
        return made

    async def connect():
        config.load()
        async with await asyncio.get_running_loop().create_server(make, "127.0.0.1") as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            reset = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            writer.close()
            async with asyncio.timeout(10):
                while alive[0]() is not None:
                    await asyncio.sleep(0.01)
                    gc.collect()

    asyncio.run(connect())


def test_an_answer_is_not_given_to_another_request(front, upstream):
    """Nobody takes the error of invalid bytes for the answer to what was sent before them."""
    with hang(front, b"ab") as connection:
        wait_for(lambda: upstream.num_waiting == 1)
        connection.sendall(b"junk\r\n\r\n")
        connection.sendall(message(b"no"))
        upstream.release()
        answer = connection.makefile("rb").read()
    assert re.findall(rb'"body": "(\w*)"', answer) == [b"ab"]
    assert answer.count(b"HTTP/1.1 ") == 1


def test_chunked_bodies_and_an_offered_upgrade(front, upstream):
    parts = [b"a" * 70_000, b"b", b"c" * 300_000]
    answer = httpx.post(f"{front.url}/predictions/score", content=iter(parts))
    assert answer.json()["body"] == b"".join(parts).decode()
    assert dict(answer.json()["headers"])["Content-Length"] == "370001"
    # As Java's client and curl --http2 do.
    http2 = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk")
    with front.connect() as connection:
        connection.sendall(message(b"abc", *http2))
        for _ in range(2):
            status, body = read_answer(connection)
            assert status == 200 and body["body"] == "abc"
            connection.sendall(message(b"abc"))
    offered = (b"Connection: Upgrade, Upgrade", b"UPGRADE: h2c", b"Upgrade: websocket")
    offers = [
        message(b"0"),
        message(b"1", *offered),
        head(*offered, CHUNKED) + b"1\r\n2\r\n0\r\n\r\n",
        message(b"3", *offered, b"Connection: close"),
    ]
    with front.connect() as connection:
        for i, request in enumerate(offers):
            connection.sendall(request)
            status, body = read_answer(connection)
            assert status == 200 and body["body"] == str(i)
        assert is_closed(connection)


@pytest.mark.parametrize("num_early", [1, 2, 3, 4])
def test_a_body_stays_as_it_is_however_the_end_of_the_head_arrives(front, upstream, num_early):
    """Words of a head in a body, after a first part with so many bytes of the blank line."""
    body = b"a\r\nUpgrade: h2c\r\n\r\nb"
    whole = message(body, b"Upgrade: h2c")
    first = len(whole) - len(body) - 4 + num_early
    with front.connect() as connection:
        for _ in range(2):
            connection.sendall(whole[:first])
            time.sleep(0.05)
            connection.sendall(whole[first:])
            status, answer = read_answer(connection)
            assert status == 200 and answer["body"] == body.decode()


def test_an_upgrade_is_declined_however_it_arrives(front, upstream):
    whole = message(b"abc", b"Connection: Upgrade", b"Upgrade: h2c")
    first = whole.index(b"\r\nUpgrade:")
    with front.connect() as connection:
        for place in range(first, first + 12):
            connection.sendall(whole[:place])
            time.sleep(0.03)
            connection.sendall(whole[place:])
            status, body = read_answer(connection)
            assert status == 200 and body["body"] == "abc"
        for byte in whole:
            connection.sendall(bytes([byte]))
            time.sleep(0.002)
        assert read_answer(connection)[0] == 200


@pytest.mark.parametrize(
    "trailer",
    [
        b"X-Ade-Probe: secret-of-probes",
        b"Content-Type: test/413",
        b"Host: localhost",
        b"Origin: http://a.example",
    ],
)
def test_trailers_are_not_headers(front, upstream, trailer):
    request = head(CHUNKED, b"X-Ade-Probe: no") + b"1\r\nx\r\n0\r\n" + trailer + b"\r\n\r\n"
    assert ask(front, request)[0] == 200
    assert not {"X-Ade-Probe", "Content-Type"} & set(dict(upstream.seen[-1]["headers"]))


def test_a_body_waits_for_100_continue(front, upstream):
    with front.connect() as connection:
        connection.sendall(head(b"Content-Length: 3", b"Expect: 100-continue"))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"abc")
        assert read_answer(connection)[0] == 200


def test_large_bodies_are_refused_before_they_are_sent(short, upstream):
    """Or when a client ignores the announced limit, and sends the whole body or chunks."""
    most = SHORT["body_bytes"]
    status, body = ask(short, head(b"Content-Length: %d" % (most + 1), b"Expect: 100-continue"))
    assert status == 413 and body["error"]["code"] == "request_too_large"
    whole: Any = bytes(most + 1)
    for content in (whole, (bytes(2**16) for _ in range(80))):
        answer = post(short, content=content)
        assert answer.status_code == 413 and error_of(answer) == "request_too_large"
    assert upstream.seen == []
    assert post(short, "ours", whole[:-1]).status_code == 415
    assert [len(one["body"]) for one in upstream.seen] == [most]


def test_the_documented_limits_are_those_of_the_front():
    limits = Limits()
    page = " ".join((ROOT / "docs" / "api.md").read_text().split())
    for text in (
        f"more than {limits.body_bytes / 2**20:g} MiB",
        f"more than {MAX_FIELDS} fields in a form",
        f"the request took longer than {limits.receive_s:g} seconds to arrive",
        f"headers of more than {limits.head_bytes / 2**10:g} KiB or {HEAD_FIELDS} fields",
        f"{limits.waiting} requests for the model are waiting, this one has waited for "
        f"{limits.waiting_s:g} seconds, the bodies of all clients exceed "
        f"{limits.memory_bytes / 2**20:g} MiB, or the port has {limits.connections:,} connections",
        f"did not answer within {limits.upstream_s:g} seconds. A request may wait for "
        f"{limits.waiting_s:g} seconds before that",
        f"head does not arrive within {limits.receive_s:g} seconds, if its answer is not read "
        f"within {limits.answer_s:g} seconds from then on",
    ):
        assert text in page


def test_long_heads_are_refused(front, upstream):
    for endless in (b"X-Long: " + b"x" * 400_000, b"X-Short: 1\r\n" * 40_000):
        status, body = ask(front, head().removesuffix(b"\r\n"), endless)
        assert status == 431 and body["error"]["code"] == "headers_too_large"
    assert ask(front, message(b"", b"X-Long: " + b"x" * 60_000))[0] == 200
    upstream.seen.clear()
    with front.connect() as connection:  # headers after a body
        connection.sendall(head(CHUNKED) + b"1\r\na\r\n0\r\n")
        with pytest.raises(OSError):
            for _ in range(100):
                connection.sendall(b"X-Trailer: " + b"x" * 100_000 + b"\r\n")
                time.sleep(0.01)
    assert upstream.seen == [] and post(front).status_code == 200


# Clients that are slow, or many


def test_heads_that_stall_are_dropped(short, upstream):
    """With no byte or single bytes, before the first request or after one."""
    silent, half, blank, second = stalled = [short.connect() for _ in range(4)]
    half.sendall(head().removesuffix(b"\r\n"))
    second.sendall(PING)
    assert read_answer(second)[0] == 200

    def all_closed():
        for connection, data in ((half, b"X: 1\r\n"), (blank, b"\r\n"), (second, b"\r\n")):
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
        return all(is_closed(connection, 0.1) for connection in stalled)

    wait_for(all_closed, 10)  # by time: so many bytes and fields would not be too many
    for connection in stalled:
        connection.close()


def test_stalled_bodies_do_not_block_others(lenient, upstream):
    stalled = [lenient.connect() for _ in range(50)]
    for connection in stalled:
        connection.sendall(head(b"Content-Length: 1000000") + b"x" * 50_000)
    assert post(lenient).status_code == 200
    assert answered(stalled) == [], "before the stalled ones are dropped"
    for connection in stalled:
        with connection:
            status, body = read_answer(connection)
            assert status == 408 and body["error"]["code"] == "request_timeout"
    assert len(upstream.seen) == 1


def test_bodies_that_trickle_are_refused(short, upstream):
    started = time.monotonic()
    with short.connect() as connection:
        connection.sendall(head(b"Content-Length: 1000"))
        while not answered([connection]):
            connection.sendall(b"x")
            time.sleep(0.3)
        assert read_answer(connection)[0] == 408 and 1.5 < time.monotonic() - started < 20
    assert upstream.seen == []


def test_bodies_have_a_budget_together(short, upstream):
    """Once it is used up, large bodies are refused, small ones are not; later it is free again."""
    large = b"x" * (3 * 2**20)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, short, "wait", large)
        wait_for(lambda: upstream.num_waiting == 1)
        assert is_refused(post(short, content=large))
        assert post(short, content=b"x" * 60_000).status_code == 200
        upstream.release()
        assert first.result().status_code == 200
    assert post(short, content=large).status_code == 200


def test_connections_are_bounded(lenient, upstream):
    time.sleep(0.1)
    before = num_refusals(lenient, "overloaded")
    held = [lenient.connect() for _ in range(LENIENT["connections"])]
    status, body = ask(lenient)
    assert status == 503 and body["error"]["code"] == "overloaded"
    # Each port has its own: a full API can still be observed.
    assert num_refusals(lenient, "overloaded") == before + 1
    for connection in held:
        connection.close()

    def is_answered():
        with contextlib.suppress(httpx.TransportError):
            return post(lenient).status_code == 200
        return False

    wait_for(is_answered)


@contextlib.contextmanager
def unread_answer(front, size=UNREAD, *fields):
    """A client that reads one byte of a large answer."""
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        lazy.connect(("127.0.0.1", front.port))
        lazy.sendall(message(b"%d" % size, b"Content-Type: test/large", *fields))
        assert lazy.recv(1) == b"H"  # the front has the answer now
        yield lazy


def test_answers_that_nobody_reads_are_dropped(short, upstream):
    """After their time, whatever the client sends; then their memory is free."""
    with unread_answer(short) as lazy:
        lazy.sendall(PING)
        assert is_refused(post(short, content=b"x" * 2**20))  # all together exceed the budget
        wait_for(lambda: post(short, content=b"x" * 2**20).status_code == 200)
        assert is_closed(lazy)


def test_answers_that_nobody_reads_have_a_budget_together(lenient, upstream):
    """Answers of the same size do not give way to each other, so a further one is refused.

    Small ones are not.
    """
    size = str(UNREAD).encode()
    with unread_answer(lenient):
        assert is_refused(post(lenient, "large", size))
        assert post(lenient).status_code == 200
    wait_for(lambda: post(lenient, "large", size).status_code == 200)


def test_no_connection_outlasts_a_client_that_does_not_read(short, upstream):
    """Whatever part of an answer remains in the front, even a few bytes."""
    process = psutil.Process(short.process.pid)

    def has_none():
        found = process.net_connections("tcp")
        return not any(one.status == psutil.CONN_ESTABLISHED for one in found)

    with contextlib.ExitStack() as stack:
        for size in range(2**21, 2**22, 2**16):
            stack.enter_context(unread_answer(short, size, b"Connection: close"))
        wait_for(has_none, 30)


def test_a_slow_reader_gets_everything(lenient, upstream):
    url, seen = f"{lenient.url}/predictions/score", 0
    given: Any = {"content": str(UNREAD).encode(), "headers": {"Content-Type": "test/large"}}
    with httpx.stream("POST", url, **given) as answer:
        for part in answer.iter_raw(2**20):
            seen += len(part)
            time.sleep(0.2)
    assert seen == UNREAD


# Turns


def hang(front, body, pipelined=b""):
    connection = front.connect()
    connection.sendall(message(body, b"Content-Type: test/wait") + pipelined)
    return connection


@pytest.mark.parametrize("pipelined", [b"", message(b"later")], ids=["alone", "pipelined"])
def test_a_request_whose_client_leaves_while_waiting_is_not_computed(lenient, upstream, pipelined):
    taken = [hang(lenient, b"taken") for _ in range(2)]
    wait_for(lambda: upstream.num_waiting == 2)
    # In one piece: behind a request that came later, the front would not read that the client left.
    gone, patient = hang(lenient, b"gone", pipelined), hang(lenient, b"patient")
    wait_for(lambda: is_refused(post(lenient)))  # two wait already
    gone.close()
    wait_for(lambda: upstream.num_waiting == 2)
    time.sleep(0.3)
    upstream.release()
    assert [read_answer(connection)[0] for connection in taken] == [200, 200]
    wait_for(lambda: upstream.num_waiting == 1)
    upstream.release()
    assert read_answer(patient)[0] == 200
    assert [came["body"] for came in upstream.seen] == ["taken", "taken", "patient"]


def test_an_upstream_that_hangs_is_answered_for(short, upstream):
    """Both a request in flight and a waiting one get an answer when their time is over."""
    with ThreadPoolExecutor(3) as pool:
        started = time.monotonic()
        answers = list(pool.map(lambda _: post(short, "wait"), range(3)))
        assert time.monotonic() - started < 25
    codes = sorted(error_of(answer) for answer in answers)
    assert codes == ["overloaded", "unavailable", "unavailable"]
    assert all(is_refused(answer, error_of(answer)) for answer in answers)
    assert post(short).status_code == 200


class InstantLoop(asyncio.SelectorEventLoop):
    """A loop with a clock of its own, which advances by the waits alone: they take no real time."""

    def __init__(self):
        self.now = 0.0
        selector = selectors.DefaultSelector()
        select = selector.select

        def skip(timeout=None):
            assert timeout is not None, "everything waits for something that never comes"
            self.now += timeout
            return select(0)

        selector.select = skip  # type: ignore[method-assign]
        super().__init__(selector)

    def time(self):
        return self.now


def test_the_bound_follows_the_time_that_answers_take():
    async def play(limit, num, seconds):
        """The largest number in flight at once, after the bound has had time to adapt."""
        in_flight: set[int] = set()
        most: list[int] = []

        async def one(i):
            async with limit.turn():
                in_flight.add(i)
                most.append(len(in_flight))
                await asyncio.sleep(seconds)
                in_flight.discard(i)

        await asyncio.gather(*(one(i) for i in range(num)))
        return max(most[-num // 4 :])

    async def check():
        limit = InFlightLimit(Limits(in_flight=(3, 8, 40), latency_s=0.1))
        assert await play(limit, 200, 0.001) == 40  # fast answers: as many as wait
        # After slow answers few are in flight, so that the others can still be dropped.
        assert await play(limit, 60, 0.15) == 3
        # But no worker is idle.
        assert (
            await play(InFlightLimit(Limits(in_flight=(3, 8, 40), latency_s=0.1), 50), 200, 0.15)
            == 50
        )
        assert await play(limit, 200, 0.001) == 40
        with pytest.raises(ApiError, match="too many requests are waiting"):
            await play(InFlightLimit(Limits(in_flight=(1, 1, 1), waiting=1)), 3, 0.01)

    with asyncio.Runner(loop_factory=InstantLoop) as runner:
        runner.run(check())


def test_no_engine_lets_a_worker_be_idle():
    model: Any = SimpleNamespace(name="score", identity="m@1", num_workers=99, answer=None)
    limit = Application([model], {}, Limits()).api("/predictions/score").in_flight
    assert limit is not None and limit._least == 99


async def take_turn(limit):
    async with limit.turn():
        pass


async def steps(num):
    for _ in range(num):
        await asyncio.sleep(0)


def test_a_turn_is_not_lost_whenever_a_request_is_cancelled():
    """Or if the last request leaves just as another comes."""

    async def check(num_before, num_steps, leaves_first):
        limit = InFlightLimit(Limits(in_flight=(1, 1, 1)))
        async with limit.turn():
            waiting = asyncio.create_task(take_turn(limit))
            await steps(num_before)
            if leaves_first is False:
                waiting.cancel()
                await steps(num_steps)
        if leaves_first:
            await steps(num_steps)
            waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=leaves_first is not None)
        async with asyncio.timeout(5):
            await take_turn(limit)
        assert limit._num_in_flight == 0

    for case in itertools.product(range(6), range(8), (True, False, None)):
        asyncio.run(check(*case))


@pytest.mark.parametrize("num_steps", range(4))
@pytest.mark.parametrize("leaves, stops", [(True, False), (False, True), (True, True)])
def test_a_client_that_leaves_ends_only_its_own_work(num_steps, leaves, stops):
    """Also one that left before; a request that the server stops is cancelled, whoever leaves."""

    async def check():
        has_left, ended, after = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def receive():
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def work():
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        async def request():
            with contextlib.suppress(ClientGone):
                await unless_gone(work(), receive)
            after.set()

        task = asyncio.create_task(request())
        await steps(num_steps)
        if leaves:
            has_left.set()
        if stops:
            task.cancel()
        await asyncio.wait([task], timeout=5)
        assert task.done() and task.cancelled() == stops and after.is_set() == (not stops)
        if num_steps > 1:
            await asyncio.wait_for(ended.wait(), 5)

    asyncio.run(check())


def test_a_stop_answers_what_was_accepted(tmp_path):
    made = RunningFront(tmp_path)
    upstream = Upstream(made.socket)
    with hang(made, b"") as connection:
        wait_for(lambda: upstream.num_waiting == 1)
        threading.Timer(0.5, upstream.release).start()
        assert made.stop() == 0
        assert read_answer(connection)[0] == 200
    upstream.stop()
    assert made.log.read_text() == ""


FAILING = """
import asyncio, contextlib, sys
from collections import Counter
from handlers.front import listen
from handlers.front.admission import Limits, Memory
from handlers.front.front import Endpoint, Front

async def fail(request):
    raise ZeroDivisionError

async def hang(request):
    print("hangs", flush=True)
    await asyncio.sleep(1000)

@contextlib.asynccontextmanager
async def build():
    endpoints = {"/fail": Endpoint(fail), "/hang": Endpoint(hang)}
    yield listen.ServerApp(Front(endpoints.get, Limits(), Memory(Limits()), "", Counter()))

sockets = [listen.open_socket("127.0.0.1", int(sys.argv[1]))]
listen.run_on(sockets, Limits(), build, 1)
"""


def test_what_fails_or_is_cut_off_is_answered_in_the_shape():
    (port,) = free_ports(1)
    command = [sys.executable, "-c", FAILING, str(port)]
    with (
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process,
        contextlib.ExitStack() as at_the_end,
    ):
        at_the_end.callback(process.kill)  # without it, a failure would wait for ever

        def get(path):
            return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=60)

        def listens():
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                return True
            return False

        wait_for(listens, 60)
        answer = get("/fail")
        assert (answer.status_code, error_of(answer)) == (500, "internal_error")
        with ThreadPoolExecutor(1) as pool:
            cut = pool.submit(get, "/hang")
            assert process.stdout is not None and process.stdout.readline() == "hangs\n"
            process.terminate()
            answer = cut.result()
        assert (answer.status_code, error_of(answer)) == (503, "stopping")
        assert answer.headers["retry-after"] == "1"
        assert process.stderr is not None
        log = process.stderr.read()
        assert log.count("Traceback") == 1 and "ZeroDivisionError" in log, log


def test_probes_need_not_wait_while_others_are_answered(monkeypatch):
    """A slow operation must not look broken; one that answers nobody must."""

    async def check():
        may_end, refusals, limits = asyncio.Event(), Counter[str](), Limits()

        async def answer(request):
            if request.body == b"slow":
                await may_end.wait()
            return Answer(200, [], b"")

        score, sample, metrics = (
            InFlightLimit(limits),
            InFlightLimit(limits),
            Endpoint(answer, INFERRING),
        )
        scoring = Endpoint(answer, INFERRING, "tiny@1", in_flight=score)
        endpoints = {"/score": scoring, "/v1": scoring}
        endpoints |= {"/sample": Endpoint(answer, INFERRING, in_flight=sample), "/metrics": metrics}
        front = Front(endpoints.__getitem__, limits, Memory(limits), "secret", refusals)

        async def send(body=b"", path="/score", **headers):
            response = await client.post(path, content=body, headers=headers)
            return response.status_code

        async def probe(path="/score"):
            return await send(path=path, **{PROBE_HEADER: "secret"})

        transport = httpx.ASGITransport(front)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            assert await probe() == 200
            slow = asyncio.create_task(send(b"slow"))
            while not score.clients.number:
                await asyncio.sleep(0)
            assert await probe() == 200  # computed: probes are no sign that others are answered
            assert await send(path="/v1") == 200  # which waits in the same queue
            assert await probe() == 503 and await probe("/sample") == 200
            busy = await client.post("/score", headers={PROBE_HEADER: "secret"})
            assert busy.headers[MODEL_HEADER] == "tiny@1"  # as `ade status` shows it
            assert await probe("/metrics") == 200
            assert not refusals and await send() == 200
            monkeypatch.setattr("handlers.front.admission.ANSWERING_S", 0.0)
            assert await probe() == 200
            monkeypatch.undo()
            may_end.set()
            assert await slow == 200 and await probe() == 200

    asyncio.run(check())


def test_a_websocket_is_closed():
    def find(path):
        raise AssertionError("looked for an endpoint")

    sent: list[Any] = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "websocket.connect"}

    front = Front(find, Limits(), Memory(Limits()), "", Counter())
    asyncio.run(front({"type": "websocket", "path": "/predictions/score"}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


# Settings


def settings():
    return FrontSettings(
        host="127.0.0.1",
        port=1,
        metrics_port=2,
        exposes_metrics=False,
        token="the-token",
        allowed_hosts=("host",),
        probe_secret="the-secret",
    )


def test_settings_are_kept_and_secret(tmp_path):
    path = tmp_path / "front.json"
    before = os.umask(0)
    try:
        settings().save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert FrontSettings.load(path) == settings()
    assert not re.search("the-token|the-secret", repr(settings()))
    with pytest.raises(FileExistsError):
        settings().save(path)


@pytest.mark.parametrize("change", [{"more": 1}, {"token": ...}])
def test_settings_with_other_keys_are_refused(tmp_path, change):
    path = tmp_path / "front.json"
    settings().save(path)
    values = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
    with pytest.raises(ValueError, match="must be a JSON object with the keys"):
        FrontSettings.load(path)
