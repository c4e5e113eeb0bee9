"""The HTTP client and the types of the API's contract.

It lives in other people's programs, so it imports nothing else of this project than ``ade_base``.
:class:`AdeClient` and the types that its methods take and return are imported when they are used::

    from ade_client import AdeClient

    with AdeClient() as client:
        print(client.score(["cat.png"])[0].bpd)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ade_client.client import AdeClient, AdeError, GroupScore, Samples, image_file
    from ade_client.contract import GivenLatents, GivenLevel, Latents, Reconstruction, ScoreResult

__all__ = [
    "AdeClient",
    "AdeError",
    "GivenLatents",
    "GivenLevel",
    "GroupScore",
    "Latents",
    "Reconstruction",
    "Samples",
    "ScoreResult",
    "image_file",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("ade_client.client"), name)
