"""The page's layout, and its server with ``/readyz`` and ``/openapi.json``."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from gradio.state_holder import SessionState
from starlette.routing import Mount

from ade_base.brand import MARK, MARK_FILE, NAME
from ade_base.pictures.read import MAX_FILE_BYTES
from ade_base.ports import USER
from serving.api.guard import Guard
from serving.api.openapi import openapi_document
from serving.api.protocol import BoundedProtocol, ConnectionLimits
from serving.engine.bundle import Bundle, open_bundle
from serving.page.files import UPLOADS, inbox
from serving.page.inputs import TabContext, html, make_inbox
from serving.page.models import Examples, Models
from serving.page.routes import LOGGED_OUT, UPLOAD, OpenRoutes, report
from serving.page.runs import UNEXPECTED
from serving.page.sweep import start_sweeping
from serving.page.tab_about import AboutTab
from serving.page.tab_compare import CompareTab
from serving.page.tab_explore import ExploreTab
from serving.page.tab_many import ManyTab
from serving.page.tab_reconstruct import ReconstructTab
from serving.page.tab_sample import SampleTab
from serving.page.tab_score import ScoreTab
from serving.page.theme import HEAD, make_theme
from serving.page.uploads import Quota, receive

MAX_QUEUED = 64  # events
MAX_SESSIONS = 200  # whose state is kept in memory, the last used ones
# Unread ones of all sessions, each of which counts as another. Those of an event take 35 kB.
MAX_MESSAGES = 2_000
QUEUE_SLEEP_S = 0.02  # by default Gradio polls every ms, which takes 6 % of a core
IDLE_S = 0.1  # between two checks whether a stopping page still computes something
DELIVERY_S = 0.5  # for the last results to be sent
READY_FOR_S = 1.0  # for which an answer of /readyz is reused
READY_WAIT_S = 2.0  # for the answer that another caller of /readyz gets; then the one before
TABS: dict[str, Callable[[TabContext], Any]] = {
    "Score": ScoreTab,
    "Score many": ManyTab,
    "Sample": SampleTab,
    "Reconstruct": ReconstructTab,
    "Explore": ExploreTab,
    "Compare": CompareTab,
    "About": AboutTab,
}
TAGLINE = "Is this image like those that the gate was calibrated on?"


class PageBlocks(gr.Blocks):
    """Gradio's blocks, with errors that reveal neither the machine nor the request.

    Clients learn nothing about the machine, and the log nothing about a request.
    """

    async def process_api(
        self,
        block_fn: Any,
        inputs: list[Any],
        state: SessionState | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        """Run an event: everything between a request and its answer, with the tabs' functions."""
        try:
            return await super().process_api(block_fn, inputs, state, *args, **options)
        except gr.Error as error:
            error.print_exception = False  # meant for the client
            # The page shows it as HTML; it may quote a file.
            error.message = escape(str(error.message), quote=False)
            raise
        except Exception as error:
            report("an event failed", error)
            raise gr.Error(UNEXPECTED, print_exception=False) from None
        finally:
            # Gradio remembers every file, in order to delete it; serving.page.sweep does that.
            for paths in self.temp_file_sets:
                paths.clear()
            # It also keeps the last value of every component for deep links, which are closed: a
            # table of 2,000 thumbnails for each session.
            for config in state.config_values.values() if state else ():
                config.get("props", {}).pop("value", None)


def build_page(models: Models) -> gr.Blocks:
    """All tabs under one head."""
    names = {
        name: "{}, {} × {} pixels".format(name, *bundle.image_shape[1::-1])
        for name, bundle in models.bundles.items()
    }
    # Of several models, the dropdown says which one is chosen.
    only = f"<br><small>{escape(names[models.first])}</small>" if len(names) == 1 else ""
    head = (
        f'<header class="ade-head">{MARK}<div><h1>{NAME}</h1><p>{TAGLINE}{only}</p></div></header>'
    )
    with PageBlocks(title=NAME, analytics_enabled=False) as page:
        choices = [(name, value) for value, name in names.items()]
        with gr.Row(equal_height=True):
            with gr.Column(scale=2, min_width=280):
                html(head)
            # Beside the head, so that a first verdict needs no scrolling.
            model = gr.Dropdown(
                choices,
                value=models.first,
                label="Model",
                visible=len(names) > 1,
                scale=1,
                min_width=280,
            )
        inbox, examples = make_inbox(), Examples(models)
        shown = gr.Radio(list(TABS), value=next(iter(TABS)), visible=False)
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            for name, lay_out in TABS.items():
                if lay_out is CompareTab and len(models.bundles) == 1:
                    continue  # there are no other models to compare with
                with gr.Tab(name, id=name) as tab:
                    # First: the browser calls it before the tab's own listeners, which may wait
                    # for the service.
                    tab.select(
                        None, None, shown, js=f"() => {json.dumps(name)}", api_visibility="private"
                    )
                    lay_out(TabContext(models, model, tabs, tab, shown, inbox, examples))
    return page


def make_app(url: str, bundles: list[Bundle], token: str | None) -> FastAPI:
    """The page, ``/readyz`` and ``/openapi.json`` in one application."""
    models = Models(url, bundles, token)
    app = FastAPI(title="AV-ADE page", docs_url=None, redoc_url=None, openapi_url=None)

    asking, ready, known_at = threading.Lock(), False, -math.inf

    def known() -> JSONResponse:
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    @app.api_route("/readyz", methods=["GET", "HEAD"])
    async def readyz() -> JSONResponse:
        nonlocal ready, known_at
        # Anybody may ask, and an answer takes four inferences: callers that wait share the first.
        # They take no thread, which the tabs need. Under load it takes longer than they wait.
        deadline = time.monotonic() + READY_WAIT_S
        while not asking.acquire(blocking=False):
            if time.monotonic() > deadline:
                return known()
            await asyncio.sleep(0.02)
        try:
            if time.monotonic() - known_at >= READY_FOR_S:
                ready = await run_in_threadpool(models.is_ready)
                known_at = time.monotonic()
        finally:
            asking.release()
        return known()

    document = openapi_document(url, bundles, token is not None)

    @app.api_route("/openapi.json", methods=["GET", "HEAD"])
    def openapi() -> JSONResponse:
        return JSONResponse(document)

    (inbox() / UPLOADS).mkdir(mode=0o700, exist_ok=True)
    quota = Quota()

    @app.post(UPLOAD)
    async def upload(request: Request) -> Response:
        inside = httpx.ASGITransport(gradio)
        async with httpx.AsyncClient(transport=inside, base_url="http://localhost") as login:
            # As bytes: a cookie that another service on this host has set need not be ASCII.
            cookies = [one for one in request.scope["headers"] if one[0] == b"cookie"]
            answer = await login.get("/gradio_api/login_check", headers=cookies)
        if answer.status_code != 200:
            return PlainTextResponse(LOGGED_OUT, answer.status_code)
        return await receive(request, quota)

    blocks = build_page(models).queue(
        default_concurrency_limit=4,
        max_size=MAX_QUEUED,
        api_open=False,  # otherwise clients may skip the queue
    )
    blocks._queue.sleep_when_free = QUEUE_SLEEP_S
    blocks.state_session_capacity = MAX_SESSIONS
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        head=HEAD,
        theme=make_theme(),
        favicon_path=str(MARK_FILE),
        auth=None if token is None else (USER, token),
        show_error=False,
        max_file_size=MAX_FILE_BYTES,
        run_history=False,
        enable_monitoring=False,
        footer_links=["api"],
    )
    gradio = gradio_of(app)
    # Gradio checks the files that a request names only in an app that was launched, and mounting an
    # app does not count as a launch.
    blocks.has_launched = True
    return app


def gradio_of(app: FastAPI) -> Any:
    """Return the application of Gradio that is mounted in the page's."""
    return next(route.app for route in app.routes if isinstance(route, Mount))


def count_unread(queue: Any, session: str | None) -> int:
    """Count the answers that a session has requested and not read.

    A client may name as many sessions as it likes, and Gradio forgets none: if there are too many,
    or too much that nobody reads, those that were used least recently are forgotten here, except
    for those whose events are not computed yet.
    """
    events, messages = queue.pending_event_ids_session, queue.pending_messages_per_session
    if session in events:
        events[session] = events.pop(session)  # now the last
    sizes = {name: 1 + (messages[name].qsize() if name in messages else 0) for name in events}
    excess = sum(sizes.values()) - MAX_MESSAGES
    for name, size in sizes.items():
        if excess > 0 and events[name].isdisjoint(queue.event_ids_to_events):
            del events[name]
            messages.pop(name, None)
            excess -= size
    return len(events.get(session, ()))


class PageServer(uvicorn.Server):
    """Serves the page behind a guard; the token is required by the page's login.

    Each open tab has a stream by which Gradio sees that it is open. When the server stops, it ends
    these streams once nothing is computed: otherwise it would wait until all tabs are closed.

    Args:
        app: of :func:`make_app`.
        allowed_hosts: host names that requests may use.
        address: ``host`` and ``port``.
    """

    def __init__(self, app: FastAPI, allowed_hosts: list[str], **address: Any) -> None:
        self._gradio = gradio_of(app)
        self._queue = self._gradio.get_blocks()._queue
        routes = OpenRoutes(app, partial(count_unread, self._queue))
        # Uploads may be slow, and the streams of open tabs last.
        limits = ConnectionLimits(receive_s=None, answer_s=None)
        protocol: Any = partial(BoundedProtocol, limits, Counter(), Counter())
        super().__init__(
            uvicorn.Config(
                Guard(routes, allowed_hosts),
                http=protocol,
                ws="none",
                log_level="warning",
                access_log=False,
                # A proxy on this machine names the client, whose uploads have a quota.
                proxy_headers=True,
                forwarded_allow_ips="127.0.0.1",
                **address,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_streams())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_streams(self) -> None:
        # Results that nobody reads, of tabs that were closed meanwhile, stay pending for ever.
        while len(self._queue) or any(job is not None for job in self._queue.active_jobs):
            await asyncio.sleep(IDLE_S)
        await asyncio.sleep(DELIVERY_S)
        self._gradio.stop_event.set()


def main() -> None:
    """``python -m serving.page.app``; the launcher calls it."""
    parser = argparse.ArgumentParser(description="The web page of a running service.")
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--url", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument(
        "--allowed-hosts",
        metavar="NAME",
        nargs="*",
        default=[],
        help="host names that requests may use",
    )
    parser.add_argument("--socket", type=int, help="descriptor of a socket that listens already")
    args = parser.parse_args()
    os.umask(0o077)
    # Gradio builds a table of them after each error.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"
    # Gradio requires files that it shows to be in the temporary or the current folder.
    tempfile.tempdir = str(inbox())
    left = os.listdir(inbox())  # by a page that ended and that this one replaces
    app = make_app(
        args.url,
        [open_bundle(folder.resolve()) for folder in args.bundles],
        os.environ.get("ADE_TOKEN"),
    )
    os.chdir(inbox())
    start_sweeping(inbox(), left)
    server = PageServer(app, args.allowed_hosts, host=args.host, port=args.port)
    server.run(None if args.socket is None else [socket.socket(fileno=args.socket)])


if __name__ == "__main__":
    main()
