"""How a request passes through TorchServe, from the front to a handler.

The content type has a header of its own, so that TorchServe takes every body as it is and the
worker parses it. TorchServe's parser of forms reads single bytes through several layers of
buffers: a file of 10 MB takes it 0.3 s of processor time, and the worker a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ade_client.contract import PROBE_HEADER

TYPE_HEADER = "X-Ade-Content-Type"


def pack(content_type: str, is_probe: bool) -> dict[str, str]:
    """The headers of a request to TorchServe."""
    headers = {TYPE_HEADER: content_type} if content_type else {}
    if is_probe:
        headers[PROBE_HEADER] = "1"
    return headers


def unpack(headers: Mapping[str, Any], id: str) -> dict[str, Any]:
    """What :func:`handlers.service.worker.answer_batch` takes beside the body.

    Args:
        headers: as the handler gets them.
        id: identifies the request in logs.
    """
    content_type = headers.get(TYPE_HEADER, "")
    return {"content_type": content_type, "probe": PROBE_HEADER in headers, "id": id, "v2": None}
