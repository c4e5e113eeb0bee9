"""The front on Ray: the ASGI application of :mod:`handlers.service`.

Behind it are replicas instead of worker processes.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.exceptions import BackPressureError

from ade_client.contract import MODEL_HEADER
from extensions.ray.serve.calls import Asked, Calls
from extensions.ray.serve.environment import DRAINING_S
from extensions.ray.serve.logs import open_log
from extensions.ray.serve.reporter import Measured, Reporter
from extensions.ray.serve.scaling import LastingQueue
from extensions.ray.serve.settings import Access, ServeSettings
from handlers.front.admission import Limits, Memory
from handlers.front.exposition import metrics_answer
from handlers.front.front import Answer, Endpoint, Front, Request, other_model
from handlers.service import protocols
from handlers.service.application import OPEN, Application, served_models
from handlers.service.metrics import ANSWER_SECONDS, MODEL, QUEUE_SECONDS
from handlers.service.worker import check_same
from serving.api.guard import App, Guard, Message, Receive, Scope, Send
from serving.api.openapi import openapi_document
from serving.engine.bundle import open_bundle
from serving.ingest.errors import no_answer, overloaded, stopping, worker_died

logger = logging.getLogger(__name__)
REQUEST_ID = "x-request-id"  # given by Ray's proxy, or by the client
MAX_ID = 128
LOOK_S = 2.0  # between two looks at which models have replicas
LOOK_TIMEOUT_S = 10.0  # longer than a full queue takes
FINISH_S = 25.0  # for accepted requests after a stop is requested


class RemoteModel:
    """A model that replicas compute.

    Args:
        name: of the model and of its deployment.
        identity: of the model, ``NAME@HASH``.
        handle: of the deployment.
        metadata: of the model, by the Open Inference Protocol.
        num_workers: replicas at most.
        timeout_s: for an answer, the queue included.
    """

    def __init__(
        self,
        name: str,
        identity: str,
        handle: Any,
        metadata: dict[str, Any],
        num_workers: int,
        timeout_s: float,
    ) -> None:
        self.name = name
        self.identity = identity
        self.metadata = metadata
        self.num_workers = num_workers
        self.is_ready = False
        # That requests took, and waited for their turn, since both were last reported.
        self.seconds = self.waited = 0.0
        self._handle = handle
        self._calls = Calls(handle)
        self._timeout_s = timeout_s

    async def answer(self, request: Request, v2: int | None = None) -> Answer:
        """The answer to a request.

        Raises:
            ApiError: 503, a replica died over it, too many wait, or it took too long; 412, a
                replica of another model than the requested one answered.
        """
        about = {
            # Ray's proxy adds this header to the answer by itself.
            "id": request.headers.get(REQUEST_ID, "")[:MAX_ID] or str(uuid.uuid4()),
            "content_type": request.content_type,
            "probe": request.is_probe,
            "v2": v2,
        }
        if not request.is_probe:
            self.waited += time.perf_counter() - request.arrived
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = Answer(*await self._calls.answer(Asked(about, bytes(request.body))))
        except TimeoutError:
            raise no_answer() from None
        except BackPressureError:
            raise overloaded("too many requests are waiting") from None
        except Exception as error:  # Ray's, which depend on how the replica ended
            logger.error("%s: no answer: %s", self.name, error)
            raise worker_died() from None
        finally:
            if not request.is_probe:
                self.seconds += time.perf_counter() - request.arrived
        # While Serve replaces replicas, they may have another bundle than this front.
        made_by = dict(answer.headers).get(MODEL_HEADER, request.model)
        if request.model and made_by != request.model:
            raise other_model(request.model, made_by)
        return answer

    async def look(self, front: str, num_waiting: int) -> None:
        """Find out whether a replica can compute, and tell it how many requests wait.

        Args:
            front: an id of it.
            num_waiting: requests of this model that wait there.
        """
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                await self._handle.ready.remote(front, num_waiting)
            self.is_ready = True
        except BackPressureError:  # it has more than enough to do
            self.is_ready = True
        except Exception as error:  # Ray's, as above
            logger.warning("%s is not ready: %r", self.name, error)
            self.is_ready = False


def _abort() -> None:
    raise ConnectionAbortedError("the client reads its answer too slowly")


@serve.ingress()
class Ingress:
    """A front.

    Args:
        settings: of the service.
        access: who may use it; as the cluster's environment says unless given.
        metrics: handle of :class:`extensions.ray.serve.reporter.MetricsReplica`.
        handles: of the deployments, by the name of the model.
        models: identity and digest of each bundle, which a front that starts later must find.

    Raises:
        BundleError: a bundle is another one by now, or cannot be read.
    """

    def __init__(
        self,
        settings: ServeSettings,
        access: Access | None,
        metrics: Any,
        handles: dict[str, Any],
        models: list[tuple[str, str]],
    ) -> None:
        context = serve.get_replica_context()
        open_log(settings.logs, f"{context.deployment}-{context.rank.rank}")
        access = access or Access.of_cluster()
        limits, self._refusals = Limits(), Counter[str]()
        bundles = [open_bundle(Path(folder)) for folder in settings.bundles]
        for bundle, model in zip(bundles, models, strict=True):
            check_same(bundle, *model)
        self._models = [
            RemoteModel(
                name,
                bundle.model_id,
                handles[name],
                protocols.metadata(name, operation, bundle, settings.backend),
                settings.replicas[operation][1],
                limits.upstream_s,
            )
            for name, operation, bundle in served_models(bundles)
        ]
        document = openapi_document("/", bundles, access.token is not None)
        self._application = Application(self._models, document, limits)
        self._metrics = metrics
        self._exposes_metrics = settings.exposes_metrics
        front = Front(self._endpoint, limits, Memory(limits), access.probe_secret, self._refusals)
        hosts = settings.allowed_hosts
        self._guarded = Guard(front, hosts, access.token, self._refusals)
        self._open = Guard(front, hosts, None, self._refusals)
        self._answering: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._looking: asyncio.Task[None]
        self._reporter: Reporter

    async def finish(self) -> None:
        """Answer what was accepted, and 503 to further requests and to those that take too long.

        To be called before Serve is shut down, which ends the proxies and the replicas at once.
        """
        self._is_stopping = True
        if self._answering:
            _, late = await asyncio.wait(self._answering, timeout=FINISH_S)
            for task in late:
                task.cancel()  # of which the front makes a 503
        await asyncio.sleep(DRAINING_S)  # until proxies have passed on the last answers

    def __serve_build_asgi_app__(self) -> App:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:  # not a method: uvicorn
            await self._answer(scope, receive, send)

        return app

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        # Ray's server closes a connection whose answer has begun and fails.
        scope["extensions"] = {
            **(scope.get("extensions") or {}),
            "ade.abort": {"connection": _abort},
        }

        async def send_bytes(message: Message) -> None:  # a view cannot travel between processes
            if isinstance(message.get("body"), memoryview):
                message = {**message, "body": bytes(message["body"])}
            await send(message)

        app = self._open if scope["path"] in OPEN else self._guarded
        answering = asyncio.create_task(app(scope, receive, send_bytes))
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)
        await answering

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._reporter = Reporter(self._metrics, self._measured)
                self._looking = asyncio.create_task(self._look())
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                self._looking.cancel()
                await self._reporter.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    def _endpoint(self, path: str) -> Endpoint:
        if self._is_stopping:
            raise stopping()
        if path == "/metrics" and self._exposes_metrics:
            return Endpoint(self._metrics_text)
        return self._application.api(path)

    async def _metrics_text(self, request: Request) -> Answer:
        return metrics_answer(await self._metrics.text.remote())

    async def _look(self) -> None:
        """Keep track of which models have a replica that can compute."""
        front = uuid.uuid4().hex
        queues = {model.name: LastingQueue() for model in self._models}
        while True:
            for name, queue in queues.items():
                queue.look(self._application.num_waiting(name))
            await asyncio.gather(*(m.look(front, queues[m.name].length) for m in self._models))
            await asyncio.sleep(LOOK_S)

    def _measured(self) -> tuple[Measured, Mapping[str, int]]:
        # Ray cancels the requests of clients that leave, which the front takes for its own end.
        refusals = {code: n for code, n in self._refusals.items() if code != stopping().code}
        self._refusals.clear()
        measured: Measured = []
        for model in self._models:
            if model.seconds:
                labels = {"model_name": model.name, MODEL: model.identity}
                measured.append((ANSWER_SECONDS.name, labels, model.seconds))
                # To which the replicas add.
                measured.append((QUEUE_SECONDS.name, labels, model.waited))
                model.seconds = model.waited = 0.0
        return measured, refusals
