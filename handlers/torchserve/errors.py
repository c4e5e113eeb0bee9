"""Translates TorchServe's own errors into the API's.

TorchServe answers ``{"code": STATUS, "type": JAVA_EXCEPTION, "message": TEXT}``. The front
translates this by the table below.
"""

from __future__ import annotations

import logging

from serving.ingest.errors import ApiError, internal_error, malformed, overloaded, worker_died

logger = logging.getLogger(__name__)
BY_STATUS = {
    404: (404, "unknown_model", "the service has no model of this name"),
    413: (413, "request_too_large", "the request is larger than the server reads"),
}
WORKER_DIED = "Worker died"  # other failures share the type of this message
FRONTS_KEY_REFUSED = "InvalidKeyException"  # about the front's key, not about a client's token
NO_WORKER = 503  # a full queue has it too, but the front never sends more than fit there
OVERLOADED = 507


def translate(status: int, kind: str, message: str) -> ApiError:
    """The API's error for one of TorchServe's own.

    Args:
        status: status of the answer.
        kind: name of the Java exception.
        message: its text.
    """
    known = BY_STATUS.get(status)
    if known is not None:
        return ApiError(*known)
    if WORKER_DIED in message:
        return worker_died()
    if status == NO_WORKER:
        return ApiError(503, "unavailable", "no worker can take the request: try again later")
    if status == OVERLOADED:
        return overloaded("the service cannot take the request now")
    if kind == FRONTS_KEY_REFUSED:
        logger.error("the model server refuses the front's key")
    elif status < 500:
        return malformed("the server cannot read the request")
    return internal_error()
