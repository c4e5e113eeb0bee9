"""Decides which requests are let in: by the host they name, the page they come from, their token.

A server on loopback is reachable by every web page that a browser on this machine shows. A page may
name the server by a host name of its own whose address it changes (DNS rebinding), and may send it
requests whose answers it cannot read (cross-site request forgery). Both leave traces in headers
that a page cannot set, and these headers are checked here. The guard is pure ASGI, because the API
and the page share it.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import ipaddress
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from serving.ingest.errors import ApiError, malformed, shaped

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Of Sec-Fetch-Site; same-site is another port or a neighbouring name.
FOREIGN_SITES = ("cross-site", "same-site")
DEFAULT_PORTS = {"http": 80, "https": 443}
KNOWN_HOSTS = 64  # that need not be parsed again; few, because a client may send long ones
LINGER_S = 5.0
LINGER_BYTES = 64 * 2**20
_AUTHORITY = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]{1,255})(?::(?P<port>[0-9]{1,5}))?")
_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<authority>.+)")


class Guard:
    """ASGI middleware that refuses requests which may not come in.

    Args:
        app: the application to protect.
        allowed_hosts: names by which clients may reach it, beside IP addresses and ``localhost``.
        token: if given, every request must send it as ``Authorization: Bearer TOKEN``.
        refusals: counts the refused requests by the error's code.
    """

    def __init__(
        self,
        app: App,
        allowed_hosts: Collection[str],
        token: str | None = None,
        refusals: Counter[str] | None = None,
    ) -> None:
        self._app = app
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._token = token
        self._refusals = Counter[str]() if refusals is None else refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            try:
                check_host(header_values(scope, "host"), self._allowed_hosts)
                if scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS:
                    check_origin(scope, self._allowed_hosts)
                if self._token is not None:
                    check_token(header_values(scope, "authorization"), self._token)
            except ApiError as error:
                self._refusals[error.code] += 1
                if scope["type"] == "websocket":  # not accepted yet, so the server answers 403
                    await send({"type": "websocket.close", "code": 1008})
                else:
                    await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)


def header_values(scope: Scope, name: str) -> list[str]:
    """All values of a header, as they came."""
    wanted = name.encode()
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == wanted]


@functools.lru_cache(KNOWN_HOSTS)
def split_authority(text: str) -> tuple[str, int | None]:
    """Host, in lower case, and port of ``HOST[:PORT]``; IPv6 addresses keep their brackets.

    Raises:
        ValueError: it is not of this form.
    """
    match = _AUTHORITY.fullmatch(text.lower())
    if match is None:
        raise ValueError(f"expected HOST or HOST:PORT, got {text!r}")
    return match["host"], None if match["port"] is None else int(match["port"])


@functools.lru_cache(KNOWN_HOSTS)
def is_address(host: str) -> bool:
    """Whether a host is an IPv4 address, or an IPv6 address in brackets."""
    try:
        if host.startswith("["):
            ipaddress.IPv6Address(host[1:-1])
        else:
            ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def check_host(values: list[str], allowed_hosts: Collection[str]) -> None:
    """Check the ``Host`` header.

    IP addresses are always allowed: DNS rebinding needs a name, since a page that was loaded from
    an address has no name whose resolution could be changed.

    Args:
        values: of the request; there must be exactly one.
        allowed_hosts: further names, in lower case.

    Raises:
        ApiError: 400 ``malformed_request`` unless there is exactly one valid value (RFC 9112,
            section 3.2); 421 ``host_not_allowed``.
    """
    try:
        (value,) = values
        host, _ = split_authority(value)
    except ValueError:
        raise malformed("the request must have exactly one valid Host header") from None
    if host != "localhost" and host not in allowed_hosts and not is_address(host):
        raise ApiError(
            421,
            "host_not_allowed",
            f"this service is not reached under the name {host!r}: start it with "
            f"--allowed-hosts {host} if it should be",
        )


def check_origin(scope: Scope, allowed_hosts: Collection[str]) -> None:
    """Check that a request does not come from another site's page.

    Programs that are not browsers send none of the headers that are checked.

    Args:
        scope: the ASGI scope of the request, whose ``Host`` has been checked.
        allowed_hosts: further names that the origin may have, with any port, because a proxy may
            have changed ``Host``.

    Raises:
        ApiError: 403 ``cross_origin``.
    """
    (host,), origins = header_values(scope, "host"), header_values(scope, "origin")
    is_foreign = any(
        site.strip().lower() in FOREIGN_SITES for site in header_values(scope, "sec-fetch-site")
    )
    if (
        is_foreign
        or len(origins) > 1
        or not all(is_same_origin(origin, host, allowed_hosts) for origin in origins)
    ):
        raise ApiError(403, "cross_origin", "requests from pages of other origins are refused")


def is_same_origin(origin: str, host_header: str, allowed_hosts: Collection[str] = ()) -> bool:
    """Whether an ``Origin`` names the host and port of ``Host``, or an allowed host.

    The origin ``null`` does not. Schemes are not compared: behind a proxy with TLS, the origin has
    ``https`` although the request arrives by ``http``.
    """
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None:
        return False
    default = DEFAULT_PORTS[match["scheme"]]
    try:
        host, port = split_authority(match["authority"])
        own_host, own_port = split_authority(host_header)
    except ValueError:
        return False
    return host in allowed_hosts or (host, port or default) == (own_host, own_port or default)


def check_token(values: list[str], token: str) -> None:
    """Check the ``Authorization`` header in constant time.

    Raises:
        ApiError: 401 ``bad_token``.
    """
    scheme, _, given = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    if (
        not hmac.compare_digest(given.strip().encode(), token.encode())
        or scheme.lower() != "bearer"
    ):
        raise ApiError(
            401, "bad_token", "the server requires Authorization: Bearer with a valid token"
        )


def error_answer(error: ApiError) -> tuple[list[tuple[str, str]], bytes]:
    """Headers (without ``Content-Length``) and body of an error in the API's shape."""
    headers = [("content-type", "application/json")]
    if error.status == 401:
        headers.append(("www-authenticate", "Bearer"))
    if error.status == 503:
        headers.append(("retry-after", "1"))
    return headers, json.dumps(error.body()).encode()


async def refuse(
    error: ApiError,
    scope: Scope,
    receive: Receive,
    send: Send,
    headers: Collection[tuple[str, str]] = (),
) -> None:
    """Answer an error before the body has been read, then close the connection.

    The body, if there is one, is discarded for a while first: many clients read no answer before
    they have sent their body, and lose the answer if the connection is closed earlier.
    """
    fields, body = error_answer(shaped(error, scope["path"]))
    fields.append(("content-length", str(len(body))))
    has_body = bool(header_values(scope, "transfer-encoding")) or header_values(
        scope, "content-length"
    ) not in ([], ["0"])
    if has_body:
        fields.append(("connection", "close"))
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.encode(), value.encode()) for name, value in [*fields, *headers]],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if has_body:
        await _discard_body(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def replay(body: bytes, after: Receive | None = None) -> Receive:
    """A ``receive`` that gives a body that was read once more, then whatever comes after it.

    Args:
        body: in one message.
        after: what follows, such as a disconnection; the same message again by default.
    """
    told = False

    async def again() -> Message:
        nonlocal told
        if told and after is not None:
            return await after()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _discard_body(receive: Receive) -> None:
    seen = 0
    try:
        async with asyncio.timeout(LINGER_S):
            while seen < LINGER_BYTES:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                seen += len(message["body"])
    except TimeoutError:
        return
