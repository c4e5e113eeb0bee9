"""The environment of the service's child processes.

Variables are inherited by name, so that secrets of other programs are not passed on.
"""

from __future__ import annotations

import os

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
PREFIXES = ("LC_", "PYTHON", "CUDA_", "NVIDIA_", "OMP_", "GOMP_", "KMP_", "OPENBLAS_", "MKL_")


def child_environment(**values: str) -> dict[str, str]:
    """Return the inherited variables that a child needs, and the given ones."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name in NAMES or name.startswith(PREFIXES)
    }
    return {**inherited, **values}
