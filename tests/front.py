"""Runs the real front in a process, with a small HTTP server behind it instead of TorchServe."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from aiohttp import web

from ade_base.ports import free_ports
from handlers.torchserve.front import ServerSettings
from handlers.torchserve.wire import TYPE_HEADER
from tests.helpers import ROOT, wait_for

SCRIPT = """
import json, sys
from pathlib import Path
from handlers.front.admission import Limits
from handlers.torchserve.front import ServerSettings, run
run(ServerSettings.load(Path(sys.argv[1])), Limits(**json.loads(sys.argv[2])))
"""
TORCHSERVE_ERRORS = {  # status, type, message: as TorchServe answers them
    "died": (500, "InternalServerException", "Worker died."),
    "full": (
        503,
        "ServiceUnavailableException",
        'Model "score" has no worker to serve inference request.',
    ),
    "memory": (507, "InternalServerException", "out of memory"),
    "fault": (500, "InternalServerException", "Exception at /home/somebody"),
    "model": (404, "ModelNotFoundException", "Model not found: score"),
    "key": (400, "InvalidKeyException", "Token Authorization failed."),
    "bad": (400, "BadRequestException", "bad"),
}


class Upstream:
    """Echoes requests as JSON; the content type ``test/WORD`` selects another behaviour."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[dict[str, Any]] = []
        self.metrics: str | None = None  # what /metrics answers, instead
        self.num_waiting = 0  # requests that wait for :meth:`release`
        self._loop = asyncio.new_event_loop()
        self._gate = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._start())

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.path)).start()

    def release(self) -> None:
        """Let those that wait have their answer; later ones wait again."""

        async def open_gate() -> None:
            gate, self._gate = self._gate, asyncio.Event()
            gate.set()

        self._run(open_gate())

    def stop(self) -> None:
        if self._runner is not None:
            self._run(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self.path.unlink(missing_ok=True)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
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
            "Keep-Alive": "timeout=5",
            "X-Hop": "1",
            "Connection": "X-Hop",
        }
        word = request.headers.get(TYPE_HEADER, "").removeprefix("test/")
        if word in TORCHSERVE_ERRORS:
            status, kind, message = TORCHSERVE_ERRORS[word]
            return web.json_response(
                {"code": status, "type": kind, "message": message}, status=status, headers=headers
            )
        if word == "ours":
            return web.Response(
                body=b'{"error": {"code": "not_an_image", "message": "m"}}',
                status=415,
                content_type="application/json",
                headers={**headers, "Retry-After": "3"},
            )
        if request.path == "/metrics" and self.metrics is not None:
            return web.Response(text=self.metrics)
        if word == "413":
            return web.Response(status=413, headers=headers)
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

    def __init__(self, folder: Path, limits: dict[str, Any] | None = None, **settings: Any) -> None:
        self.port, self.metrics_port = free_ports(2)
        self.socket = folder / "inference.sock"
        self.settings = ServerSettings(
            **{
                "host": "127.0.0.1",
                "port": self.port,
                "metrics_port": self.metrics_port,
                "exposes_metrics": False,
                "inference_socket": str(self.socket),
                "metrics_socket": str(self.socket),
                "server_key": "key-of-torchserve",
                "models": {"score": 1, "sample": 1, "tiny-score": 1},
                "identities": {"score": "m@1", "sample": "m@1", "tiny-score": "tiny@1"},
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
                [sys.executable, "-c", SCRIPT, str(path), json.dumps(limits or {})],
                cwd=ROOT,
                stdout=out,
                stderr=out,
            )
        try:
            wait_for(self._listens, 60)
        except BaseException:
            self.process.kill()
            raise

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            self.connect(self.metrics_port).close()
        except OSError:
            return False
        return True

    def connect(self, port: int | None = None, timeout: float = 20.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port or self.port), timeout)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)
