"""ONNX Runtime, without its telemetry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def onnx_runtime() -> Any:
    """Import ONNX Runtime.

    From version 1.29 on, its packages for Linux have telemetry for Microsoft, unless this variable
    is set before the first import.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def cpu_session(model: Path | bytes, threads: int = 1) -> Any:
    """Load a graph for the CPU. It logs nothing: what fails raises.

    Args:
        model: a file or its content.
        threads: of a computation. ONNX Runtime's default is one for each core of the machine, even
            for those that this process may not use.
    """
    ort = onnx_runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
