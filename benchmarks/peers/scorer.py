"""The scorer of every peer: this project's parsing, engine and answers.

Peers have as many processes as the service.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from handlers.limits import MAX_BATCH
from serving.api.service import Service
from serving.engine.engine import InferenceEngine
from serving.ingest.requests import RawRequest

BATCH = MAX_BATCH
DELAY_S = 0.001
WORKERS = int(os.environ.get("PEER_WORKERS", "2"))
PORT = int(os.environ.get("PEER_PORT", "9000"))
BUNDLE = Path(os.environ.get("PEER_BUNDLE", "pretrained/cifar10"))


class Scorer:
    """``score`` of a bundle, on one thread."""

    def __init__(self) -> None:
        engine = InferenceEngine(BUNDLE, device="cpu", operations=["score"])
        engine.warm_up()
        self._service = Service("score", engine)

    def __call__(self, requests: Sequence[RawRequest]) -> list[bytes]:
        """The bodies of the answers."""
        return [answer.body for answer in self._service.answer(requests)]
