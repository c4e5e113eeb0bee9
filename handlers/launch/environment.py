"""What the service's child processes inherit of its environment: by name, so that secrets of other
programs stay out.
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
    """The inherited variables that a child needs, and those of the call."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name in NAMES or name.startswith(PREFIXES)
    }
    return {**inherited, **values}
