"""The service as one ASGI application: the API over the pool of an engine.

``ade serve`` runs it under uvicorn: ``python -m handlers.service.application SETTINGS``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import orjson

from ade_base.extensions import load
from handlers.front import listen
from handlers.front.admission import InFlightLimit, Limits
from handlers.front.exposition import metrics_answer
from handlers.front.front import INFERRING, Answer, Endpoint, Request
from handlers.front.settings import FrontSettings
from handlers.processes.run_folder import RunFolder
from handlers.service import control
from handlers.service.metrics import Metrics
from handlers.service.options import ServingOptions, check_names, served_name
from handlers.service.pool import Pool, PooledModel
from handlers.service.protocols import V2 as v2
from handlers.service.protocols import metadata as v2_metadata
from handlers.service.release import CurrentRelease, Release
from handlers.service.worker import WorkerSettings, check_same
from serving.api.journal import SUFFIX as JOURNAL
from serving.api.openapi import openapi_document
from serving.engine.bundle import Bundle, open_bundle
from serving.engine.signatures import OPERATIONS
from serving.ingest.errors import ApiError, malformed

PREDICTIONS = ("/predictions/", "/v1/")
READY = "/readyz"
V2, V2_SLASH = "/v2", "/v2/"  # the protocol's text and its OpenAPI document
V2_LIVE, V2_READY, V2_MODELS = "/v2/health/live", "/v2/health/ready", "/v2/models/"
V2_SERVER = {
    "name": "av-ade",
    "version": metadata.version("av-ade"),
    "extensions": ["binary_tensor_data"],
}
_V2_MODEL = re.compile(r"(?P<name>[^/]+)(/versions/(?P<version>[^/]+))?(/(?P<what>.*))?")
_JOURNAL_OF_RELEASE = re.compile(rf"-release(\d+)-\d+{re.escape(JOURNAL)}")
OPEN = {READY} if v2 is None else {READY, V2_LIVE, V2_READY}  # for probes, which have no token
STOP_S = 25  # for accepted requests after a stop is requested
REFUSE_S = 20  # after which requests that still wait for a worker are answered 503


@dataclass(frozen=True, kw_only=True)
class ApplicationSettings(FrontSettings):
    """Settings of the application, besides those of its front.

    Attributes:
        pool: the engine's subclass of :class:`handlers.service.pool.Pool`, ``"module:name"``.
        release: fields of the :class:`handlers.service.release.Release`.
        workers: processes of each bundle, by operation.
        options: fields of :class:`handlers.service.options.ServingOptions`.
        logs: an existing folder.
        folder: of the service, see :class:`handlers.processes.run_folder.RunFolder`.
    """

    pool: str
    release: dict[str, Any]
    workers: dict[str, int]
    options: dict[str, Any]
    logs: str
    folder: str


class Model(Protocol):
    """A model as the application sees it, whatever computes its answers.

    Attributes:
        name: under which it is served.
        identity: ``NAME@HASH``.
        metadata: of the model, by the Open Inference Protocol.
        num_workers: that compute its answers, at most.
    """

    name: str
    identity: str
    metadata: dict[str, Any]
    num_workers: int

    @property
    def is_ready(self) -> bool:
        """Whether something can compute its answers."""

    async def answer(self, request: Request, v2: int | None = None) -> Answer:
        """The answer to a request.

        Args:
            request: of the API, or of the Open Inference Protocol.
            v2: bytes of JSON in the body, if it is of that protocol.

        Raises:
            ApiError: there is none.
        """


class Application:
    """Computes the answers of one release behind the front.

    Args:
        models: the served models.
        document: the OpenAPI document of the service.
        limits: bounds on the requests that a model holds at once.
    """

    def __init__(self, models: Sequence[Model], document: dict[str, Any], limits: Limits) -> None:
        self._models = models
        self._predictions = {
            model.name: Endpoint(
                model.answer,
                INFERRING,
                model.identity,
                InFlightLimit(limits, model.num_workers),
            )
            for model in models
        }
        self._infer = {
            model.name: Endpoint(
                functools.partial(_infer, model),
                ("POST",),
                model.identity,
                self._predictions[model.name].in_flight,
            )
            for model in models
            if v2 is not None
        }
        described = _json(200, document)
        self._reads = {
            path: Endpoint(_reading(make))
            for path, make in {
                "/ping": self._health,
                READY: self._readiness,
                "/openapi.json": lambda: described,
                "/v1/openapi.json": lambda: described,
                V2: lambda: _json(200, V2_SERVER),
                V2_SLASH: lambda: _json(200, V2_SERVER),
                V2_LIVE: lambda: _json(200, {"live": True}),
                V2_READY: self._readiness,
            }.items()
            if v2 is not None or not path.startswith(V2)
        }

    def api(self, path: str) -> Endpoint:
        """Find the endpoint of ``/predictions/{name}``, ``/v1/{name}`` and the paths for GET.

        Raises:
            ApiError: 404.
        """
        if path in self._reads:
            return self._reads[path]
        if v2 is not None and path.startswith(V2_MODELS):
            return self._v2_model(path.removeprefix(V2_MODELS))
        for prefix in PREDICTIONS:
            name = path.removeprefix(prefix)
            if name != path and name in self._predictions:
                return self._predictions[name]
            if name != path and name and "/" not in name:
                raise ApiError(404, "unknown_model", "the service has no model of this name")
        raise ApiError(
            404,
            "not_found",
            "there is no such path; there are /predictions/{operation}, /v1/{operation}, "
            + ", ".join(self._reads),
        )

    def _v2_model(self, path: str) -> Endpoint:
        """``NAME[/versions/1][/ready|/infer]``."""
        match = _V2_MODEL.fullmatch(path)
        model = next((m for m in self._models if match and match["name"] == m.name), None)
        if match is None or model is None or match["version"] not in (None, v2.VERSION):
            raise ApiError(404, "unknown_model", "the service has no such model")
        if match["what"] == "infer":
            return self._infer[model.name]
        if match["what"] == "ready":
            return Endpoint(
                _reading(
                    lambda: _json(
                        200 if model.is_ready else 503,
                        {"name": model.name, "ready": model.is_ready},
                    )
                )
            )
        if match["what"] is not None:
            raise ApiError(
                404,
                "not_found",
                f"there is no such path; a model has {V2_MODELS}{{name}}, …/ready and …/infer",
            )
        return Endpoint(_reading(lambda: _json(200, model.metadata)))

    def num_waiting(self, name: str) -> int:
        """Number of a model's requests that wait for their turn."""
        in_flight = self._predictions[name].in_flight
        return 0 if in_flight is None else in_flight.num_waiting

    def is_ready(self) -> bool:
        """Whether every model has a worker that is ready."""
        return all(model.is_ready for model in self._models)

    def _readiness(self) -> Answer:
        return _json(200 if self.is_ready() else 503, {"ready": self.is_ready()})

    def _health(self) -> Answer:
        return _json(
            200 if self.is_ready() else 503,
            {"status": "Healthy" if self.is_ready() else "Unhealthy"},
        )


class PooledApplication(Application):
    """The same over a pool: what answers for a release."""

    def __init__(self, pool: Pool, document: dict[str, Any], limits: Limits) -> None:
        super().__init__(pool.models, document, limits)
        self.refuse = pool.refuse
        self.describe = pool.describe


async def _infer(model: Model, request: Request) -> Answer:
    """Answer a request of the Open Inference Protocol."""
    length = request.headers.get(v2.LENGTH_HEADER.lower(), str(len(request.body)))
    if not length.isdecimal() or len(length) > 12 or int(length) > len(request.body):
        raise malformed(f"{v2.LENGTH_HEADER} must be at most the body's length")
    return await model.answer(request, int(length))


def _json(status: int, value: dict[str, Any]) -> Answer:
    return Answer(status, [("content-type", "application/json")], orjson.dumps(value))


def _reading(make: Callable[[], Answer]) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Answer:
        return make()

    return answer


def served_models(bundles: Sequence[Bundle]) -> list[tuple[str, str, Bundle]]:
    """Name, operation and bundle of each model that is served.

    Raises:
        BundleError: two bundles have the same name.
    """
    check_names(bundles)
    return [
        (served_name(operation, bundle.name if i else None), operation, bundle)
        for i, bundle in enumerate(bundles)
        for operation in OPERATIONS
    ]


def _pooled_models(
    settings: ApplicationSettings,
    release: Release,
    bundles: list[Bundle],
    metrics: Metrics,
    limits: Limits,
) -> list[PooledModel]:
    """A model for each operation of each bundle."""
    models = []
    for name, operation, bundle in served_models(bundles):
        # Journals of two releases must not have the same name; see remove_journals.
        journal = name if release.number == 1 else f"{name}-release{release.number}"
        workers = [
            WorkerSettings(
                str(bundle.folder),
                bundle.model_id,
                bundle.digest,
                operation,
                name,
                f"{journal}-{number}",
                settings.logs,
                ServingOptions(**settings.options),
            )
            for number in range(settings.workers[operation])
        ]
        described = v2_metadata(name, operation, bundle, settings.options["backend"])
        models.append(PooledModel(name, workers, metrics, limits.upstream_s, described))
    return models


def remove_journals(logs: Path, kept: Collection[int]) -> None:
    """Remove the journals of releases, except some. Those of the first, without a number, stay.

    Args:
        logs: their folder.
        kept: numbers of releases.
    """
    with contextlib.suppress(OSError):  # of a folder that cannot be listed
        for path in logs.glob(f"*{JOURNAL}*"):
            number = _JOURNAL_OF_RELEASE.search(path.name)
            if number is not None and int(number[1]) not in kept:
                with contextlib.suppress(OSError):
                    path.unlink()


@contextlib.asynccontextmanager
async def build_release(
    settings: ApplicationSettings, metrics: Metrics, limits: Limits, release: Release
) -> AsyncIterator[PooledApplication]:
    """What answers for a release, with its workers.

    Raises:
        BundleError: a bundle cannot be read, or is another one by now.
        WorkerError: a worker cannot be started.
    """
    bundles = [open_bundle(Path(folder)) for folder in release.bundles]
    for bundle, model, digest in zip(bundles, release.models, release.digests, strict=True):
        check_same(bundle, model, digest)
    document = openapi_document("/", bundles, settings.token is not None)
    models = _pooled_models(settings, release, bundles, metrics, limits)
    make_pool: type[Pool] = load(settings.pool)
    with metrics.of_models(release.models):
        async with make_pool(
            models, RunFolder(Path(settings.folder)).of_release(release.number)
        ) as pool:
            yield PooledApplication(pool, document, limits)


@contextlib.asynccontextmanager
async def build_app(
    settings: ApplicationSettings, limits: Limits, file: Path | None = None
) -> AsyncIterator[listen.ServerApp]:
    """The application for both ports, with the workers of its release.

    Args:
        settings: of the process.
        limits: on clients.
        file: where the settings are kept, so that a front that is started again has the same
            release.

    Raises:
        BundleError, WorkerError: the release cannot be started.
    """
    refusals = Counter[str]()
    metrics = Metrics(refusals)

    former = settings.release["number"]

    def save(release: Release) -> None:
        nonlocal former
        if file is not None:
            replace(settings, release=asdict(release)).replace(file)
        remove_journals(Path(settings.logs), {former, release.number})
        former = release.number

    scrape = Endpoint(_reading(lambda: metrics_answer(metrics.text())))
    build = functools.partial(build_release, settings, metrics, limits)
    current = CurrentRelease(build, save, limits)

    def refuse_later() -> None:
        asyncio.get_running_loop().call_later(REFUSE_S, current.refuse)

    async with (
        current.run(Release.from_dict(settings.release)),
        control.listen(RunFolder(Path(settings.folder)).front_socket, current),
    ):
        yield listen.built(
            settings, limits, current.api, scrape, refusals, OPEN, on_stop=refuse_later
        )


def run(
    settings: ApplicationSettings, limits: Limits | None = None, file: Path | None = None
) -> None:
    """Serve in this process until it is asked to stop; ``file`` as for :func:`build_app`."""
    limits = limits or Limits()
    listen.run(settings, limits, functools.partial(build_app, settings, limits, file), STOP_S)


if __name__ == "__main__":
    settings_file = Path(sys.argv[1])
    run(ApplicationSettings.load(settings_file), file=settings_file)
