"""Services in the process of the tests, and the functions of their page."""

import asyncio
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import httpx

from handlers.front.admission import Limits
from handlers.front.front import Answer, Endpoint
from handlers.front.listen import built
from handlers.front.settings import FrontSettings
from handlers.service import worker
from handlers.service.application import Application
from handlers.service.options import served_name
from handlers.service.protocols import metadata
from serving.api.openapi import openapi_document
from serving.api.service import Service
from serving.engine.engine import InferenceEngine
from serving.engine.signatures import OPERATIONS
from serving.ingest.requests import RawRequest
from serving.page.app import build_page


@contextmanager
def answered_here(bundles, operations=("sample", "score")):
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
        def do_POST(self):
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

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        # Polls often, because shutdown waits for the next poll.
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class LocalModel:
    """A model that computes where the application is, one request at a time."""

    num_workers = 1
    is_ready = True

    def __init__(self, operation, engine):
        self.name = operation
        self.identity = engine.bundle.model_id
        self.metadata = metadata(operation, operation, engine.bundle, "onnxruntime")
        self._service = Service(operation, engine)

    async def answer(self, request, v2=None):
        about = {"content_type": request.content_type, "probe": False, "id": "1", "v2": v2}
        body = bytes(request.body)
        (found,) = worker.answer_batch(self._service, self.name, {"requests": [about]}, [body])
        headers = [("content-type", found.content_type), *found.headers.items()]
        return Answer(found.status, headers, found.body)


class ServiceHere(httpx.BaseTransport):
    """The whole service but its sockets and processes, for the client of httpx.

    A request passes the guard, the front, the application and a worker's code.
    """

    def __init__(self, bundle):
        engine = InferenceEngine(bundle, device="cpu")
        models = [LocalModel(operation, engine) for operation in OPERATIONS]
        limits = Limits()
        application = Application(models, openapi_document("/", [engine.bundle], False), limits)
        settings = FrontSettings(
            host="127.0.0.1",
            port=8080,
            metrics_port=8082,
            exposes_metrics=False,
            token=None,
            allowed_hosts=(),
            probe_secret="secret-of-probes",
        )

        async def no_metrics(request):
            return Answer(200, [], b"")

        front = built(settings, limits, application.api, Endpoint(no_metrics), Counter())
        self._transport = httpx.ASGITransport(front.app)

    def handle_request(self, request):
        async def ask():
            answer = await self._transport.handle_async_request(request)
            return httpx.Response(
                answer.status_code, headers=answer.headers, content=await answer.aread()
            )

        return asyncio.run(ask())


def page_function(served, name):
    """The function of this name that the page calls, by its name in Gradio's API or in the code."""
    fns = [block for block in build_page(served).fns.values() if block.fn is not None]
    return next(block.fn for block in fns if name in (block.api_name, block.fn.__name__))


def judged(p_value=0.5, decision="accept", version="1"):
    """What the page's summary of many files reads of a score."""
    return SimpleNamespace(p_value=p_value, decision=decision, calibration=version)
