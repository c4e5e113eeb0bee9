"""LitServe with its batching, for images in JSON.

``python -m benchmarks.peers.lit_serve``
"""

from __future__ import annotations

import litserve
from fastapi import Response

from benchmarks.peers.scorer import BATCH, DELAY_S, PORT, WORKERS, Scorer
from serving.ingest.requests import RawRequest


class ScoreApi(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.scorer = Scorer()

    # LitServe would validate the request by an annotation of the argument.
    def decode_request(self, request) -> RawRequest:
        return RawRequest("application/json", request)

    def predict(self, requests: list[RawRequest]) -> list[bytes]:
        return self.scorer(requests)

    def encode_response(self, body: bytes) -> Response:
        return Response(body, media_type="application/json")


if __name__ == "__main__":
    api = ScoreApi(max_batch_size=BATCH, batch_timeout=DELAY_S, api_path="/score")
    litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS).run(
        host="127.0.0.1", port=PORT, log_level="warning", generate_client_file=False
    )
