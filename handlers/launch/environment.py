"""The environment of the service's child processes, and the cores that they may use.

Variables are inherited by name, so that secrets of other programs are not passed on.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

NAMES = frozenset(
    {
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TMPDIR",
        "TEMP",
        "TMP",
        "LD_LIBRARY_PATH",
        "VIRTUAL_ENV",
        "NO_COLOR",
        "TERM",
    }
)
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # of the container's control group
PREFIXES = ("LC_", "PYTHON", "CUDA_", "NVIDIA_", "OMP_", "GOMP_", "KMP_", "OPENBLAS_", "MKL_")


def child_environment(**values: str) -> dict[str, str]:
    """Return the inherited variables that a child needs, and the given ones."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name in NAMES or name.startswith(PREFIXES)
    }
    return {**inherited, **values}


def available_cores(cpu_max: Path = CPU_MAX) -> int:
    """Cores that this process may use: those of its affinity, or fewer by a container's CPU limit.

    Args:
        cpu_max: microseconds of CPU and of the period, or ``max`` for no limit.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):
        return cores
