"""Translates between TorchServe's handler interface and :class:`serving.api.service.Service`.

TorchServe is archived upstream.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ts.metrics import caching_metric

from handlers.service.worker import answer_batch
from handlers.torchserve import wire
from handlers.torchserve.reporter import Reporter, worker_name
from serving.api.journal import Journal
from serving.api.responses import error_response
from serving.api.service import Service
from serving.engine.engine import InferenceEngine
from serving.ingest.errors import overloaded, stopping
from serving.ingest.forms import quieten_parser

EXIT_DELAY_S = 0.2  # time to send the answers


class OperationHandler:
    """Serves the operation that its archive names.

    TorchServe creates one object per worker process, calls :meth:`initialize` once and
    :meth:`handle` with each batch.
    """

    def initialize(self, context: Any) -> None:
        """Load the engine from the archive's folder with the options of its YAML file."""
        _quieten()
        quieten_parser()
        properties = context.system_properties
        options = context.model_yaml_config["ade"]
        engine = InferenceEngine(
            Path(properties["model_dir"]),
            options["backend"],
            options["device"],
            [options["operation"]],
            int(properties.get("gpu_id") or 0),
            options["cuda_graphs"],
        )
        engine.warm_up()
        journal = Journal(Path(os.environ["LOG_LOCATION"]), f"{context.model_name}-{worker_name()}")
        self.service = Service(options["operation"], engine, options["threads"], journal)
        self._busy = threading.Lock()
        self._leaving = threading.Event()
        # Not started when it is needed: without memory there may be no room for a thread.
        threading.Thread(target=self._exit_when_leaving, daemon=True).start()
        self._stop_folder = Path(os.environ["ADE_STOP_FOLDER"])
        Reporter(
            self.service.telemetry, context.metrics, context.model_name, self._each_second
        ).start()

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer a batch; each item has its own status, content type and headers."""
        with self._busy:
            if self._stop_folder.exists():
                answers = [error_response(stopping()) for _ in data]
            elif self._leaving.is_set():
                answers = [error_response(overloaded("the worker is replaced")) for _ in data]
            else:
                heads = [
                    wire.unpack(context.get_all_request_header(i), context.request_ids[i])
                    for i in range(len(data))
                ]
                answers = answer_batch(
                    self.service,
                    context.model_name,
                    {"requests": heads},
                    [row["body"] for row in data],
                )
        bodies = []
        for i, answer in enumerate(answers):
            context.set_response_status(answer.status, HTTPStatus(answer.status).phrase, idx=i)
            context.set_response_content_type(i, answer.content_type)
            for name, value in answer.headers.items():
                context.set_response_header(i, name, value)
            bodies.append(answer.body)
        if self.service.is_exhausted:
            self._leaving.set()
        return bodies

    def _exit_when_leaving(self) -> None:
        """End the process of a worker without memory: TorchServe starts another one."""
        self._leaving.wait()
        time.sleep(EXIT_DELAY_S)
        os._exit(1)

    def _each_second(self) -> None:
        self.service.telemetry.observe_calibrations(self.service.engine.versions)
        self._tell_when_done()

    def _tell_when_done(self) -> None:
        """While the service stops, create a file in the stop folder once the worker is idle."""
        if self._stop_folder.exists() and self._busy.acquire(blocking=False):
            self._busy.release()
            (self._stop_folder / worker_name()).touch()


def _quieten() -> None:
    """Silence TorchServe's log lines per batch, which its Java process would parse one by one.

    Metrics also travel as log lines, at the level INFO, so their logger stays on. Warnings are
    written to standard error as well: TorchServe logs that stream as warnings, and standard output
    at a level that is left out of ``torchserve.log``.
    """
    warnings = logging.StreamHandler(sys.stderr)
    warnings.setLevel(logging.WARNING)
    logging.getLogger().addHandler(warnings)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger(caching_metric.__name__).setLevel(logging.INFO)
