"""Lets only those requests through to Gradio that the page makes, with files of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.guard import replay
from serving.ingest.errors import ApiError
from serving.ingest.forms import check_charset
from serving.page.files import FileRefused, RequestRefused, own_path
from serving.page.uploads import CLIENT_FILES, TOO_MANY

logger = logging.getLogger(__name__)

FILE = "/gradio_api/file="
UPLOAD = "/gradio_api/upload"
# Paths; those that end with a slash or an equals sign are prefixes. Gradio has many more:
# proxies, streams, recordings, deep links, monitoring, functions of components, tokens as JSON, a
# logout of everybody by a link, …: the page uses none of them.
GET = (
    "/",
    "/config",
    "/config/",
    "/login_check",
    "/readyz",
    "/openapi.json",
    "/theme.css",
    "/favicon.ico",
    "/manifest.json",
    "/assets/",
    "/static/",
    "/svelte/",
    FILE,
    "/gradio_api/app_id",
    "/gradio_api/call/",
    "/gradio_api/heartbeat/",
    "/gradio_api/info",
    "/gradio_api/login_check",
    "/gradio_api/queue/data",
    "/gradio_api/startup-events",
    "/gradio_api/theme.css",
)
POST = (
    "/login",
    "/login/",
    UPLOAD,
    "/gradio_api/call/",
    "/gradio_api/cancel",
    "/gradio_api/queue/join",
    "/gradio_api/reset",
    "/gradio_api/run/",
)
ALLOWED = {"GET": GET, "HEAD": GET, "POST": POST}
STALL_S = 30.0
MAX_UNREAD = 64  # as many as may wait for computation
# Of all but uploads: enough to name 2,000 files; 4 MiB of empty objects took 208 MB.
MAX_BODY = 2 * 2**20
MAX_LOGIN = 8 * 2**10  # which everybody may send
# Lists and objects in a body. 4,000 files have two each; empty ones take 25 times their text.
MAX_LISTS = 20_000
MAX_SESSION = 64  # characters of a session's name; those that Gradio makes have up to 36
LOGGED_OUT = (
    "You are no longer logged in, perhaps because the page was started again: reload the page."
)


def route_of(method: str, path: str) -> str | None:
    """Find the entry of :data:`ALLOWED` for a path; ``None`` if the page does not use it."""
    return next(
        (
            one
            for one in ALLOWED.get(method, ())
            if path == one or (one != "/" and one[-1] in "/=" and path.startswith(one))
        ),
        None,
    )


def paths_in(value: Any) -> Iterator[str]:
    """Yield every path of a file that a JSON value names, however deep."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if isinstance(value.get("path"), str):
                yield value["path"]
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)


def summary(error: BaseException) -> str:
    """Describe an error by its type and lines of code, without anything of the request."""
    places = [
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    return f"{type(error).__name__} at {' < '.join(reversed(places[-6:]))}"


_reported: dict[str, float] = {}  # log lines, and when each was last written


def report(what: str, error: BaseException) -> None:
    """Log an error, at most one of a kind per minute, so that no client fills the log."""
    line = f"{what}: {summary(error)}"
    if time.monotonic() - _reported.get(line, -math.inf) > 60:
        _reported[line] = time.monotonic()
        logger.error(line)


class OpenRoutes:
    """ASGI middleware that lets only the page's own requests through.

    Every path of a file in a request is checked here, before Gradio sees it: it must lie in the
        page's own folder.

    Args:
        app: the page's application, which mounts Gradio's.
        unread: counts the answers that a session, or ``None`` for a new one, has requested and not
            read, which Gradio keeps without a limit.
    """

    def __init__(self, app: ASGIApp, unread: Callable[[str | None], int]) -> None:
        self.app = app
        self.unread = unread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":  # the page has no WebSocket
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        route = route_of(method, path)
        started = is_replaced = False

        async def forward(message: Message) -> None:
            nonlocal started, is_replaced
            started = True
            # Gradio's own is an object, at which its frontend fails without a word.
            if message.get("status") == 401 and method == "POST" and path != UPLOAD:
                is_replaced = True
                await _refusal(401, LOGGED_OUT)(scope, receive, send)
            if is_replaced:
                return
            # Gradio would let pages of any port of localhost read its answers.
            if message["type"] == "http.response.start":
                message["headers"] = [
                    (name, value)
                    for name, value in message["headers"]
                    if not name.lower().startswith(b"access-control-")
                ]
            await send(message)

        try:
            if route is None or b"deep_link" in unquote_to_bytes(scope["query_string"]):
                return await PlainTextResponse("Not found", 404)(scope, receive, send)
            if route == FILE:
                own_path(path.removeprefix(FILE))
            if method == "POST" and path != UPLOAD:
                receive = replay(await self._checked_body(scope, receive), receive)
            await self.app(scope, receive, forward)
        except FileRefused as error:
            await _refusal(403, str(error))(scope, receive, send)
        except (RequestRefused, ApiError) as error:
            await _refusal(error.status, error.message)(scope, receive, send)
        except orjson.JSONDecodeError:
            await PlainTextResponse("The body is not valid JSON.", 400)(scope, receive, send)
        except Exception as error:
            report(f"{method} {route}", error)
            if not started:
                await PlainTextResponse("Internal error", 500)(scope, receive, send)
            else:
                with contextlib.suppress(Exception):  # shorter than announced: close the connection
                    await send({"type": "http.response.body", "body": b""})

    async def _checked_body(self, scope: Scope, receive: Receive) -> bytes:
        """Read the body of a login or of an event.

        Raises:
            RequestRefused: it is too slow or too large, or its session has too much to read.
            ApiError: the form of a login has another codec than UTF-8.
            FileRefused: it names a file that is not the page's own.
            JSONDecodeError: that of an event is not JSON.
        """
        is_login = scope["path"].startswith("/login")
        most = MAX_LOGIN if is_login else MAX_BODY
        try:
            async with asyncio.timeout(STALL_S):
                body = await _body(receive, most)
        except TimeoutError:
            raise RequestRefused(408, f"The body did not come within {STALL_S:.0f} s.") from None
        if body is None:
            text = f"A request may have at most {most >> 10:,} KiB."
            raise RequestRefused(413, text if is_login else f"{text} {TOO_MANY}")
        if is_login:
            check_charset(Headers(scope=scope).get("content-type", ""))
        else:
            await self._check_event(body)
        return body

    async def _check_event(self, body: bytes) -> None:
        if body.count(b"[") + body.count(b"{") > MAX_LISTS:
            text = f"A request may have at most {MAX_LISTS:,} lists and objects."
            raise RequestRefused(413, f"{text} {TOO_MANY}")
        value = orjson.loads(body)
        named = [*itertools.islice(paths_in(value), CLIENT_FILES + 1)]
        if len(named) > CLIENT_FILES:
            raise RequestRefused(413, TOO_MANY)
        # Thousands take a part of a second, which other requests must not wait.
        await run_in_threadpool(lambda: [own_path(path) for path in named])
        session = value.get("session_hash") if isinstance(value, dict) else None
        if session is not None and not (isinstance(session, str) and len(session) <= MAX_SESSION):
            text = f"session_hash must be a string of at most {MAX_SESSION} characters."
            raise RequestRefused(400, text)
        if self.unread(session) >= MAX_UNREAD:
            raise RequestRefused(429, f"{MAX_UNREAD} answers wait to be read: reload the page.")


def _refusal(status: int, text: str) -> JSONResponse:
    """An answer whose text the page shows as a message, if the event was queued."""
    return JSONResponse({"detail": text}, status)


async def _body(receive: Receive, most: int) -> bytes | None:
    """Read a whole body; ``None`` if it is too long or the client is gone."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > most or message["type"] == "http.disconnect":
            return None
    return bytes(body)
