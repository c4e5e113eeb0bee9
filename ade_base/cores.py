"""The processor cores that a program may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

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
