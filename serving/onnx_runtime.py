"""ONNX Runtime, without its telemetry."""

from __future__ import annotations

import os
from typing import Any


def onnx_runtime() -> Any:
    """Import ONNX Runtime.

    From version 1.29 on, its packages for Linux have telemetry for Microsoft, unless this variable
    is set before the first import.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime
