"""Services in the process of the tests, and the functions of their page."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from handlers.launch.options import served_name
from serving.api.service import Service
from serving.engine.engine import InferenceEngine
from serving.ingest.requests import RawRequest
from serving.page.app import build_page
from serving.page.models import Models


@contextmanager
def answered_here(
    bundles: dict[str, Path], operations: Sequence[str] = ("sample", "score")
) -> Iterator[str]:
    """A server in this process with the real services; yields its address.

    Args:
        bundles: by name; the first one is served under the plain names.
        operations: that it has.
    """
    services = {
        served_name(operation, name if i else None): Service(operation, engine)
        for i, (name, engine) in enumerate(
            (name, InferenceEngine(folder, device="cpu", operations=operations))
            for name, folder in bundles.items()
        )
        for operation in operations
    }

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            service = services[self.path.removeprefix("/predictions/")]
            (answer,) = service.answer([RawRequest(self.headers["Content-Type"], body)])
            self.send_response(answer.status)
            for name, value in {
                "Content-Type": answer.content_type,
                "Content-Length": str(len(answer.body)),
                **answer.headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        # Polls often, because shutdown waits for the next poll.
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def page_function(served: Models, name: str) -> Callable[..., Any]:
    """The function of this name that the page calls, by its name in Gradio's API or in the code."""
    fns = [block for block in build_page(served).fns.values() if block.fn is not None]
    return next(block.fn for block in fns if name in (block.api_name, block.fn.__name__))


def judged(p_value: float = 0.5, decision: str = "accept", version: str = "1") -> Any:
    """What the page's summary of many files reads of a score."""
    return SimpleNamespace(p_value=p_value, decision=decision, calibration=version)
