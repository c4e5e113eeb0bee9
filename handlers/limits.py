"""Limits that are the same for every engine, so that clients see no difference."""

from __future__ import annotations

MAX_BATCH = 32  # requests that are computed together
MAX_BATCH_DELAY_S = 0.001  # that the first request of a batch waits for others
# A body that may have as many images as a full batch of small requests. No request is added to a
# batch after it, because all answers of a batch wait for its last image.
LARGE_BYTES = 512 * 2**10
QUEUE_SIZE = 256  # of a model; further requests are answered 503
RESPONSE_TIMEOUT_S = 120  # for a batch; then its worker is replaced
STARTUP_TIMEOUT_S = 180  # of a worker
# Larger bodies are rejected. 16 MiB of images are 22 MiB as base64 in JSON; the latents of 256
# images take about as much.
MAX_REQUEST_BYTES = 32 * 2**20
