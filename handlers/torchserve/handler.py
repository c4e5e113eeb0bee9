"""Translates between TorchServe's handler interface and :class:`serving.api.service.Service`.

TorchServe is archived upstream.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import orjson

from handlers.service import wire
from handlers.service.options import ServingOptions
from handlers.service.worker import WorkerSettings, answer_batch, load_service, pack_answers
from handlers.torchserve.reporter import Reporter, worker_name
from serving.api.responses import Response, error_response
from serving.ingest.errors import overloaded
from serving.ingest.forms import quieten_parser

EXIT_DELAY_S = 0.2  # time to send the answers
# Of a body with a batch of requests, of which the pool takes care. TorchServe's own headers hold
# 8 KiB, and its parser of forms is slow.
BATCH_TYPE = "application/x-ade-batch"


class OperationHandler:
    """Serves the operation that its archive names.

    TorchServe creates one object per worker process, calls :meth:`initialize` once and
    :meth:`handle` with each batch. Behind our pool a body is a batch of requests. In anybody
    else's TorchServe it is one request: an image file, or JSON.
    """

    def initialize(self, context: Any) -> None:
        """Load the engine from the archive's folder with the options of its YAML file."""
        _quieten()
        quieten_parser()
        properties, given = context.system_properties, context.model_yaml_config["ade"]
        changed = {
            "bundle": properties["model_dir"],
            "name": f"{given['name'].rpartition('-')[0]}-{worker_name()}",
            "logs": os.environ.get("LOG_LOCATION", "logs"),
            "options": ServingOptions(**given["options"]),
        }
        reporter = Reporter(context.model_name)
        try:
            settings = WorkerSettings(**{**given, **changed})
            self.service = load_service(settings, int(properties.get("gpu_id") or 0))
        except Exception as error:
            reporter.fail(error)
            raise
        self._leaving = threading.Event()
        # Not started when it is needed: without memory there may be no room for a thread.
        threading.Thread(target=self._exit_when_leaving, daemon=True).start()
        reporter.start(self.service)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer what TorchServe gives a worker at a time; all of it is of one kind."""
        bodies = [row.get("body", row.get("data", b"")) for row in data]
        types = [context.get_request_header(i, "Content-Type") or "" for i in range(len(data))]
        if types[:1] == [BATCH_TYPE]:
            found = [self._answer_batch(context.model_name, body) for body in bodies]
        else:
            found = self._answer_each(bodies, types, context)
        if self.service.is_exhausted:
            self._leaving.set()
        return found

    def _answer_batch(self, model: str, body: bytes) -> bytes:
        """The answers to a batch of the pool's."""
        head, bodies = wire.unpack(body)
        return b"".join(pack_answers(self._answer(model, head["requests"], bodies)))

    def _answer_each(self, bodies: list[Any], types: list[str], context: Any) -> list[bytes]:
        """Each body's own answer, with its status, content type and headers."""
        about = [
            {"id": id, "content_type": kind, "probe": False, "v2": None}
            for id, kind in zip(context.request_ids.values(), types, strict=True)
        ]
        # TorchServe has parsed what is called JSON, unless its configuration says otherwise.
        raw = [orjson.dumps(b) if isinstance(b, (dict, list)) else bytes(b) for b in bodies]
        answers = self._answer(context.model_name, about, raw)
        for i, answer in enumerate(answers):
            context.set_response_status(answer.status, HTTPStatus(answer.status).phrase, idx=i)
            context.set_response_content_type(i, answer.content_type)
            for name, value in answer.headers.items():
                context.set_response_header(i, name, value)
        return [answer.body for answer in answers]

    def _answer(
        self, model: str, about: list[dict[str, Any]], bodies: Sequence[bytes]
    ) -> list[Response]:
        if self._leaving.is_set():
            return [error_response(overloaded("the worker is replaced")) for _ in about]
        return answer_batch(self.service, model, {"requests": about}, list(bodies))

    def _exit_when_leaving(self) -> None:
        """End the process of a worker without memory: TorchServe starts another one."""
        self._leaving.wait()
        time.sleep(EXIT_DELAY_S)
        os._exit(1)


def _quieten() -> None:
    """Silence TorchServe's log lines per batch, which its Java process would parse one by one.

    Warnings are written to standard error as well: TorchServe logs that stream as warnings, and
    standard output at a level that is left out of ``torchserve.log``.
    """
    warnings = logging.StreamHandler(sys.stderr)
    warnings.setLevel(logging.WARNING)
    logging.getLogger().addHandler(warnings)
    logging.getLogger().setLevel(logging.WARNING)
