"""The machine and its libraries: processor, cores, signals, ONNX Runtime."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import signal
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

_FLAGS = ("sse4_2", "avx", "avx2", "fma", "avx512", "avx_vnni", "amx", "asimd", "sve", "bf16")
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # of the container's control group


def available_cores(cpu_max: Path = CPU_MAX) -> int:
    """Cores that this process may use: those of its affinity, or fewer by a container's CPU limit.

    Args:
        cpu_max: microseconds of CPU and of the period, or ``max`` for no limit.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS and Windows
        cores = os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):
        return cores


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM after the block, where they would raise an exception inside it.

    They are not blocked, because child processes inherit that. Python delivers them to the main
    thread. A signal without a Python handler keeps its effect: ``torchrun`` ends a process at once
    that waits for another one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    signs = [s for s in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(s))]
    before = [signal.signal(sign, lambda number, frame: held.append(number)) for sign in signs]
    try:
        yield
    finally:
        for sign, handler in zip(signs, before, strict=True):
            signal.signal(sign, handler)
        for number in held:
            signal.raise_signal(number)


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


def numerics() -> dict[str, str]:
    """What the networks' last digits may depend on: versions, processor, instruction sets."""
    model, flags = platform.processor(), ""
    try:
        info = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        info = []
    for line in info:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        if key.strip() in ("flags", "Features"):
            flags = " ".join(sorted(f for f in value.split() if f.startswith(_FLAGS)))
            break
    return {
        "machine": platform.machine(),
        "cpu": model,
        "instructions": flags,
        "onnxruntime": onnx_runtime().__version__,
        "numpy": metadata.version("numpy"),
    }
