"""The Open Inference Protocol, if the extension that translates it is there."""

from __future__ import annotations

from typing import Any

from ade_base.extensions import added, load
from serving.engine.bundle import Bundle

_CODE = added("protocols").get("v2")
V2: Any = None if _CODE is None else load(_CODE)


def metadata(name: str, operation: str, bundle: Bundle, backend: str) -> dict[str, Any]:
    """A model's inputs and outputs by that protocol; nothing without it."""
    described: dict[str, Any] = {} if V2 is None else V2.metadata(name, operation, bundle, backend)
    return described
