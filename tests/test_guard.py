"""The guard's decisions by Host, Origin and token, for HTTP and websockets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from serving.api.guard import Guard, is_address, is_same_origin, split_authority

ALLOWED = ("ade.example.org", "Mixed.Example")
TOKEN = "0123456789abcdef"


async def hello(scope, receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def ask(*headers, method="GET", kind="http", token=None, body=None):
    """The messages that a guarded application sends for one request."""
    sent: list[dict[str, Any]] = []
    parts = list(body or [])

    async def receive():
        part = parts.pop(0) if parts else b""
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(dict(message))

    scope = {
        "type": kind,
        "method": method,
        "path": "/",
        "headers": [(n.lower().encode(), v.encode()) for n, v in headers],
    }
    if kind == "websocket":
        del scope["method"]
    asyncio.run(Guard(hello, ALLOWED, token)(scope, receive, send))
    if body is not None:
        assert not parts, "the body was not discarded"
    return sent


def outcome(*headers, **options):
    """Status, and the error's code or the answer's text."""
    start, *bodies = ask(*headers, **options)
    text = b"".join(message["body"] for message in bodies)
    if start["status"] == 200:
        return 200, text.decode()
    fields = dict(start["headers"])
    assert fields[b"content-type"] == b"application/json"
    assert int(fields[b"content-length"]) == len(text)
    error = json.loads(text)["error"]
    assert set(error) == {"code", "message"}
    return start["status"], error["code"]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:8080",
        "192.168.0.7:1",
        "localhost",
        "LocalHost:8080",
        "[::1]",
        "[::1]:8080",
        "[fe80::1]",
        "ade.example.org",
        "ADE.example.org:443",
        "mixed.example",
    ],
)
def test_accepted_hosts(host):
    assert outcome(("Host", host)) == (200, "hello")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "x.localhost",
        "localhost.",
        "ade.example.org.",
        "x.ade.example.org",
        "0x7f.1",
        "127.1",
        "2130706433",
        "[127.0.0.1]",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_rejected_hosts(host, method):
    assert outcome(("Host", host), method=method) == (421, "host_not_allowed")


@pytest.mark.parametrize(
    "host",
    [
        "x" * 256,
        "::1",
        "[::1",
        "[ade.example.org]",
        "",
        " ",
        "127.0.0.1:",
        "127.0.0.1:x",
        "127.0.0.1:123456",
        "user@127.0.0.1",
        "127.0.0.1/",
        "127.0.0.1, evil.example",
        "127.0.0.1\n",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_invalid_hosts(host, method):
    assert outcome(("Host", host), method=method) == (400, "malformed_request")


def test_exactly_one_host():
    assert outcome() == (400, "malformed_request")
    assert outcome(("Host", "127.0.0.1"), ("Host", "127.0.0.1")) == (400, "malformed_request")


def test_a_refused_name_is_told_how_to_be_allowed():
    _, *bodies = ask(("Host", "gpu-box:8080"))
    assert "--allowed-hosts gpu-box" in json.loads(bodies[0]["body"])["error"]["message"]


SAME = [
    ("127.0.0.1:8080", "http://127.0.0.1:8080"),
    ("[::1]:8080", "http://[::1]:8080"),
    ("localhost", "http://localhost"),
    ("LOCALHOST:80", "http://localhost"),
    ("127.0.0.1", "http://127.0.0.1:80"),
    ("1.2.3.4", "https://1.2.3.4"),
    ("1.2.3.4:443", "https://1.2.3.4"),
    ("127.0.0.1:8080", "https://ade.example.org"),  # a proxy that changed Host
    ("localhost", "http://ADE.example.org:7860"),
]
OTHER = [
    ("127.0.0.1:8080", "http://evil.example"),
    ("127.0.0.1:8080", "http://127.0.0.1:8081"),
    ("127.0.0.1:8080", "null"),
    ("127.0.0.1:8080", "http://127.0.0.1"),
    ("127.0.0.1:8080", "http://localhost:8080"),
    ("127.0.0.1:8080", ""),
    ("127.0.0.1", "ftp://127.0.0.1"),
    ("127.0.0.1", "http://127.0.0.1/"),
    ("127.0.0.1", "http://x@127.0.0.1"),
    ("127.0.0.1", "http://127.0.0.1 http://evil.example"),
    ("127.0.0.1", "chrome-extension://127.0.0.1"),
    ("127.0.0.1", "https://ade.example.org.evil.example"),
]


@pytest.mark.parametrize("host, origin", SAME)
def test_accepted_origins(host, origin):
    assert outcome(
        ("Host", host), ("Origin", origin), ("Sec-Fetch-Site", "same-origin"), method="POST"
    ) == (200, "hello")


@pytest.mark.parametrize("host, origin", OTHER)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "FROBNICATE"])
def test_rejected_origins(host, origin, method):
    assert outcome(("Host", host), ("Origin", origin), method=method) == (403, "cross_origin")


def test_programs_other_than_browsers_are_accepted():
    assert outcome(("Host", "127.0.0.1"), method="POST") == (200, "hello")


@pytest.mark.parametrize(
    "site, status",
    [
        ("cross-site", 403),
        ("same-site", 403),
        ("Cross-Site", 403),
        ("same-origin", 200),
        ("none", 200),
    ],
)
def test_sec_fetch_site(site, status):
    assert outcome(("Host", "localhost"), ("Sec-Fetch-Site", site), method="POST")[0] == status
    # Reading is allowed; without CORS headers no page can see the answer.
    assert outcome(("Host", "localhost"), ("Sec-Fetch-Site", site))[0] == 200


def test_two_origins_are_refused():
    origin = ("Origin", "http://localhost")
    assert outcome(("Host", "localhost"), origin, origin, method="POST") == (403, "cross_origin")


@pytest.mark.parametrize(
    "headers",
    [
        [("Host", "evil.example")],
        [("Host", "localhost"), ("Origin", "http://evil.example")],
        [("Host", "localhost"), ("Sec-Fetch-Site", "cross-site")],
    ],
)
def test_websockets_are_closed_before_they_open(headers):
    assert ask(*headers, kind="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_websockets_of_the_own_page_open():
    headers = ("Host", "localhost:7860"), ("Origin", "http://localhost:7860")
    assert ask(*headers, kind="websocket") == [{"type": "websocket.accept"}]
    assert ask(*headers, kind="websocket", token=TOKEN) == [
        {"type": "websocket.close", "code": 1008}
    ]


@pytest.mark.parametrize(
    "value, status",
    [
        (f"Bearer {TOKEN}", 200),
        (f"bearer {TOKEN}", 200),
        (f"BEARER  {TOKEN}", 200),
        (f"Basic {TOKEN}", 401),
        (TOKEN, 401),
        (f"Bearer {TOKEN}x", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("", 401),
        ("Bearer \u00fc", 401),
    ],
)
def test_tokens(value, status):
    start, *_ = ask(("Host", "localhost"), ("Authorization", value), token=TOKEN)
    assert start["status"] == status
    assert (dict(start["headers"]).get(b"www-authenticate") == b"Bearer") == (status == 401)


def test_one_token():
    assert outcome(("Host", "localhost"), token=TOKEN) == (401, "bad_token")
    right = ("Authorization", f"Bearer {TOKEN}")
    assert outcome(("Host", "localhost"), right, right, token=TOKEN) == (401, "bad_token")
    # Without a token, the header belongs to the application.
    assert outcome(("Host", "localhost"), right) == (200, "hello")


def test_a_refused_body_is_discarded_and_the_connection_closed():
    start, *bodies = ask(
        ("Host", "evil.example"), ("Content-Length", "6"), method="POST", body=[b"abc", b"def"]
    )
    assert (b"connection", b"close") in start["headers"]
    assert [message["more_body"] for message in bodies] == [True, False]


def test_the_application_of_a_lifespan_is_reached():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(Guard(app, ())({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


def test_parts():
    assert split_authority("Ade.Example:80") == ("ade.example", 80)
    assert split_authority("[::1]") == ("[::1]", None)
    with pytest.raises(ValueError, match="expected HOST or HOST:PORT, got 'a b'"):
        split_authority("a b")
    assert is_address("[::1]") and is_address("10.0.0.1") and not is_address("::1")
    assert not is_address("010.0.0.1")
    assert is_same_origin("http://a:80", "a") and not is_same_origin("http://a", "b")
