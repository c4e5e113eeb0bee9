"""What every engine takes of requests and gives them, so that clients see no difference."""

from __future__ import annotations

MAX_BATCH = 32  # requests that are computed together
MAX_BATCH_DELAY_S = 0.001  # that the first of a batch waits for others
QUEUE_SIZE = 256  # of a model; further requests are answered 503
RESPONSE_TIMEOUT_S = 120  # for a batch; then its worker is replaced
STARTUP_TIMEOUT_S = 180  # of a worker
MAX_REQUEST_BYTES = (
    32 * 2**20
)  # of a body; images as JSON may have 24 MiB, latents of 256 take about as many
