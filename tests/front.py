"""Runs the real front in a process, with a small HTTP server behind it instead of a pool."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from ade_base.ports import free_ports
from ade_client.contract import PROBE_HEADER
from handlers.front import listen
from handlers.front.admission import Limits
from handlers.front.exposition import metrics_answer
from handlers.front.front import Answer, Endpoint
from handlers.front.settings import FrontSettings
from handlers.service.application import Application
from handlers.service.metrics import Metrics
from serving.ingest.errors import ApiError, no_answer
from tests.helpers import ROOT, wait_for

TYPE_HEADER = "X-Ade-Content-Type"
SCRIPT = "import sys; from tests.front import run; run(*sys.argv[1:])"
OF_SERVER = {"Content-Length", "Date", "Server"}
MODELS = {"score": "m@1", "sample": "m@1", "tiny-score": "tiny@1"}


class Forwarder:
    """A model whose only worker is the upstream."""

    metadata: dict[str, Any] = {}
    num_workers = 1
    is_ready = True

    def __init__(self, name, http):
        self.name, self.identity = name, MODELS[name]
        self._http = http

    async def answer(self, request, v2=None):
        headers = {TYPE_HEADER: request.content_type} if request.content_type else {}
        if request.is_probe:
            headers[PROBE_HEADER] = "1"
        asked = self._http.request(
            request.method, request.path, data=bytes(request.body) or None, headers=headers
        )
        try:
            async with asked as response:
                kept = {k: v for k, v in response.headers.items() if k not in OF_SERVER}
                return Answer(response.status, list(kept.items()), await response.read())
        except TimeoutError:
            raise no_answer() from None
        except aiohttp.ClientError:
            raise ApiError(503, "unavailable", "the upstream is gone: try again later") from None


def run(settings_file, socket_file, limits_json):
    """The front with its application, in this process."""
    settings, limits = FrontSettings.load(Path(settings_file)), Limits(**json.loads(limits_json))

    @contextlib.asynccontextmanager
    async def build():
        refusals = Counter[str]()

        async def scrape(request):
            return metrics_answer(Metrics(refusals).text())

        async with aiohttp.ClientSession(
            "http://localhost",
            connector=aiohttp.UnixConnector(socket_file, limit=0),
            skip_auto_headers=("Content-Type", "User-Agent", "Accept", "Accept-Encoding"),
            timeout=aiohttp.ClientTimeout(total=limits.upstream_s),
        ) as http:
            application = Application([Forwarder(name, http) for name in MODELS], {}, limits)
            yield listen.built(settings, limits, application.api, Endpoint(scrape), refusals)

    listen.run(settings, limits, build)


class Upstream:
    """Echoes requests as JSON; the content type ``test/WORD`` selects another behaviour."""

    def __init__(self, path):
        self.path = path
        self.seen: list[dict[str, Any]] = []
        self.num_waiting = 0  # requests that wait for :meth:`release`
        self._loop = asyncio.new_event_loop()
        self._gate = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._start())

    def _run(self, work):
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _start(self):
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.path)).start()

    def release(self):
        """Let those that wait have their answer; later ones wait again."""

        async def open_gate():
            gate, self._gate = self._gate, asyncio.Event()
            gate.set()

        self._run(open_gate())

    def stop(self):
        if self._runner is not None:
            self._run(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self.path.unlink(missing_ok=True)

    async def _handle(self, request):
        body = await request.read()
        what = {
            "method": request.method,
            "path": request.path_qs,
            "headers": [list(h) for h in request.headers.items()],
            "body": body.decode("latin-1"),
        }
        self.seen.append(what)
        headers = {
            "x-request-id": secrets.token_hex(8),
            "X-Ade-Model": "m@1",
            "Server-Timing": "parse;dur=1",
        }
        word = request.headers.get(TYPE_HEADER, "").removeprefix("test/")
        if word == "ours":
            return web.Response(
                body=b'{"error": {"code": "not_an_image", "message": "m"}}',
                status=415,
                content_type="application/json",
                headers={**headers, "Retry-After": "3"},
            )
        if word == "large":
            return web.Response(body=b"\0" * int(body), headers=headers)
        if word == "wait":
            self.num_waiting += 1
            try:
                await self._gate.wait()
            finally:
                self.num_waiting -= 1
        return web.json_response(what, headers=headers)


class RunningFront:
    """A front that is started by the constructor; ``limits`` replace the default limits."""

    def __init__(self, folder, limits=None, **settings):
        self.port, self.metrics_port = free_ports(2)
        self.socket = folder / "inference.sock"
        self.settings = FrontSettings(
            **{
                "host": "127.0.0.1",
                "port": self.port,
                "metrics_port": self.metrics_port,
                "exposes_metrics": False,
                "token": None,
                "allowed_hosts": ("ade.example.org",),
                "probe_secret": "secret-of-probes",
                **settings,
            }
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.metrics = f"http://127.0.0.1:{self.metrics_port}"
        path = folder / "front.json"
        self.settings.save(path)
        self.log = folder / "front.out"
        with open(self.log, "wb") as out:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    SCRIPT,
                    str(path),
                    str(self.socket),
                    json.dumps(limits or {}),
                ],
                cwd=ROOT,
                stdout=out,
                stderr=out,
            )
        try:
            wait_for(self._listens, 60)
        except BaseException:
            self.process.kill()
            raise

    def _listens(self):
        assert self.process.poll() is None, self.log.read_text()
        try:
            self.connect(self.metrics_port).close()
        except OSError:
            return False
        return True

    def connect(self, port=None, timeout=20.0):
        return socket.create_connection(("127.0.0.1", port or self.port), timeout)

    def stop(self):
        self.process.terminate()
        return self.process.wait(30)
