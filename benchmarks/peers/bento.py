"""BentoML with its adaptive batching, for images in JSON.

``bentoml serve benchmarks.peers.bento:Score``
"""

from __future__ import annotations

import bentoml

from benchmarks.peers.scorer import BATCH, WORKERS, Scorer
from serving.ingest.requests import RawRequest


@bentoml.service(workers=WORKERS, traffic={"timeout": 120}, logging={"access": {"enabled": False}})
class Score:
    def __init__(self) -> None:
        self.scorer = Scorer()

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=60_000)
    def score(self, images: list[str]) -> list[str]:
        """Score images, each of which is a file in base64."""
        return [
            body.decode()
            for body in self.scorer(
                [RawRequest("application/json", {"images": [i]}) for i in images]
            )
        ]
