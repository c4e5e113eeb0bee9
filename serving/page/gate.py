"""What of Gradio can be reached from outside, and with what: the page's first look at a request."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterator
from typing import Any

import orjson
from fastapi.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.page.files import FileRefused, own_path

logger = logging.getLogger(__name__)

FILE = "/gradio_api/file="
UPLOAD = "/gradio_api/upload"
# Paths, and with a slash or an equals sign at the end what paths begin with. Gradio has many more: proxies, streams,
# recordings, deep links, monitoring, functions of components, tokens as JSON, … The page uses none of them.
GET = ("/", "/config", "/config/", "/login_check", "/logout", "/readyz", "/openapi.json", "/theme.css", "/favicon.ico",
       "/manifest.json", "/assets/", "/static/", "/svelte/", FILE, "/gradio_api/app_id", "/gradio_api/call/",
       "/gradio_api/heartbeat/", "/gradio_api/info", "/gradio_api/login_check", "/gradio_api/queue/data",
       "/gradio_api/startup-events", "/gradio_api/theme.css")
POST = ("/login", "/login/", UPLOAD, "/gradio_api/call/", "/gradio_api/cancel", "/gradio_api/queue/join",
        "/gradio_api/reset", "/gradio_api/run/")
ALLOWED = {"GET": GET, "HEAD": GET, "POST": POST}
STALL_S = 30.0
MAX_BODY = 4 * 2**20  # of all but an upload: 2,000 files are named in less


def is_open(method: str, path: str) -> bool:
    """Whether the page uses an address."""
    return any(path == one or (one != "/" and one[-1] in "/=" and path.startswith(one)) for one in ALLOWED.get(method, ()))


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
    """Say of an error what helps to mend it and holds nothing of a request: its kind, and the lines it came from."""
    places = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__} at {' < '.join(reversed(places[-6:]))}"


class Gate:
    """ASGI middleware that lets through what the page uses.

    Every path of a file in a request is checked here, before Gradio sees it: it must lie in the page's own folder.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":  # the page has no WebSocket
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        started = False

        async def forward(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if not is_open(method, path) or b"deep_link" in scope["query_string"]:
                return await PlainTextResponse("Not found", 404)(scope, receive, send)
            if path.startswith(FILE):
                own_path(path.removeprefix(FILE))
            if method == "POST" and path != UPLOAD:
                async with asyncio.timeout(STALL_S):
                    body = await _body(receive)
                if body is None:
                    return await PlainTextResponse(f"At most {MAX_BODY >> 20} MiB.", 413)(scope, receive, send)
                if not path.startswith("/login"):
                    for named in paths_in(orjson.loads(body)):
                        own_path(named)
                receive = _replay(body, receive)
            await self.app(scope, receive, forward)
        except FileRefused as error:
            await PlainTextResponse(str(error), 403)(scope, receive, send)
        except orjson.JSONDecodeError:
            await PlainTextResponse("The body is not valid JSON.", 400)(scope, receive, send)
        except TimeoutError:
            await PlainTextResponse(f"The body did not come within {STALL_S:.0f} s.", 408)(scope, receive, send)
        except Exception as error:
            logger.error("%s %s: %s", method, path if not path.startswith(FILE) else FILE, summary(error))
            if not started:
                await PlainTextResponse("Internal error", 500)(scope, receive, send)


async def _body(receive: Receive) -> bytes | None:
    """Read a whole body; ``None`` if it is too long or its sender is gone."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY or message["type"] == "http.disconnect":
            return None
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that hands a body on in one message, and then what follows it."""
    is_first = True

    async def again() -> Message:
        nonlocal is_first
        if is_first:
            is_first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
