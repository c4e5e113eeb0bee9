"""A process that computes one operation of one bundle, a batch at a time.

``python -m handlers.service.worker`` with a connection as its standard input; it ends with that.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.service import protocols, wire
from handlers.service.options import ServingOptions
from serving.api.guard import error_answer
from serving.api.journal import Journal
from serving.api.responses import Response
from serving.api.service import Service
from serving.engine.bundle import Bundle, BundleError
from serving.engine.engine import InferenceEngine
from serving.ingest.errors import ApiError, internal_error
from serving.ingest.forms import quieten_parser, raw_request
from serving.ingest.requests import RawRequest

logger = logging.getLogger(__name__)
JOINED_BYTES = 2**16  # of a message, up to which its parts are sent as one
NO_MEMORY = 70  # exit code: a request did not fit into memory; a new process may have more


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of a worker.

    Attributes:
        bundle: folder of the bundle.
        identity: identity of the model in it, ``NAME@HASH``.
        digest: of the bundle, :attr:`serving.engine.bundle.Bundle.digest`.
        operation: one of the four operations.
        model: served name of the model.
        name: name of the worker in metrics and logs.
        logs: an existing folder.
        options: how it computes.
    """

    bundle: str
    identity: str
    digest: str
    operation: str
    model: str
    name: str
    logs: str
    options: ServingOptions


def serve(connection: socket.socket) -> int:
    """Read the settings, then compute batches; returns the exit code."""
    stream = connection.makefile("rb")
    first = wire.read(stream)
    if first is None:
        return 0
    settings = WorkerSettings(
        **{**first[0]["settings"], "options": ServingOptions(**first[0]["settings"]["options"])}
    )
    try:
        service = load_service(settings)
    except Exception as error:
        _send(connection, wire.pack({"error": f"{type(error).__name__}: {error}"}))
        raise
    _send(connection, wire.pack({"measurements": measurements(service)}))
    while message := wire.read(stream):
        _send(connection, pack_answers(answer_batch(service, settings.model, *message)))
        # The client does not wait for what is collected for the metrics.
        rest = {"measurements": measurements(service), "leaving": service.is_exhausted}
        _send(connection, wire.pack(rest))
        if service.is_exhausted:
            return NO_MEMORY
    return 0


def check_same(bundle: Bundle, identity: str, digest: str) -> None:
    """Check that nothing else was put into a bundle's folder since the service was started from it.

    A process that is replaced must not answer by that.

    Raises:
        BundleError: something was.
    """
    if bundle.digest != digest:
        raise BundleError(
            f"{bundle.folder} has become another bundle ({bundle.model_id}) since {identity} was "
            "started from it: put the former one back, or start the service again"
        )


def load_service(settings: WorkerSettings, gpu: int = 0) -> Service:
    """What computes, warmed up; on a certain GPU, if any."""
    options = settings.options
    engine = InferenceEngine(
        Path(settings.bundle),
        options.backend,
        options.device,
        [settings.operation],
        gpu,
        options.cuda_graphs,
    )
    check_same(engine.bundle, settings.identity, settings.digest)
    engine.warm_up()
    journal = Journal(Path(settings.logs), settings.name)
    return Service(settings.operation, engine, options.threads, journal)


def answer_batch(
    service: Service, model: str, head: dict[str, Any], bodies: list[bytes]
) -> list[Response]:
    """Answer requests, each as :mod:`handlers.service.wire` describes it in the head."""
    return service.answer(
        _read(service, model, about, body)
        for about, body in zip(head["requests"], bodies, strict=True)
    )


def _read(service: Service, model: str, about: dict[str, Any], body: bytes) -> RawRequest:
    probe, id, length = about["probe"], about["id"], about["v2"]
    try:
        if length is None:
            return raw_request(about["content_type"], body, probe, id)
        operation, bundle = service.operation.name, service.engine.bundle
        parsed: RawRequest = protocols.V2.parse(model, operation, bundle, body, length, probe, id)
        return parsed
    except Exception as error:  # one request must not take its batch along
        translate: Callable[[Response], Response] | None = None
        if length is not None:
            translate = functools.partial(protocols.V2.respond, None)
        elif isinstance(error, ApiError):
            translate = functools.partial(_refused, error)
        if not isinstance(error, ApiError):
            logger.exception("request %s failed", id)
            error = internal_error()
        return RawRequest(
            about["content_type"], None, probe=probe, id=id, error=error, translate=translate
        )


def _refused(error: ApiError, answer: Response) -> Response:
    """The answer to a body that is not read, with the same bytes as the front's own refusals."""
    return dataclasses.replace(answer, body=error_answer(error)[1])


def measurements(service: Service) -> list[tuple[str, dict[str, str], float]]:
    """The measurements since the last call: name, labels and value of each."""
    service.telemetry.observe_calibrations(service.engine.versions)
    return [
        (m.metric.name, dict(zip(m.metric.labels, m.labels, strict=True)), m.value)
        for m in service.telemetry.collect()
    ]


def pack_answers(answers: Sequence[Response]) -> list[wire.Body]:
    """The message with the answers to a batch."""
    heads = [
        {"status": a.status, "content_type": a.content_type, "headers": a.headers} for a in answers
    ]
    return wire.pack({"answers": heads}, [answer.body for answer in answers])


def _send(connection: socket.socket, parts: Sequence[wire.Body]) -> None:
    # Small parts at once: the reader wakes up once.
    for part in [b"".join(parts)] if sum(map(len, parts)) <= JOINED_BYTES else parts:
        connection.sendall(part)


if __name__ == "__main__":
    # The front decides when it ends, even if a terminal signals all processes.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    quieten_parser()
    with socket.socket(fileno=sys.stdin.fileno()) as own_connection:
        try:
            sys.exit(serve(own_connection))
        except ConnectionError:  # the front is gone
            sys.exit(0)
