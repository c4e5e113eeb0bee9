"""Options of the workers of a bundle, and the names under which it is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.engine.bundle import Bundle, BundleError


@dataclass(frozen=True)
class ServingOptions:
    """How the workers of a bundle compute."""

    backend: str = "onnxruntime"
    device: str = "auto"
    threads: int = 1  # for decoding image files; each worker computes with one thread
    cuda_graphs: bool = False


def check_names(bundles: Sequence[Bundle]) -> None:
    """Check that bundles can be served side by side.

    Raises:
        BundleError: two have the same name, so one would take the other's place.
    """
    names = [bundle.name for bundle in bundles]
    if len(set(names)) < len(names):
        raise BundleError(
            f"bundles served side by side need different names, got {', '.join(names)}; ade fit "
            "and ade export have the option --name"
        )


def served_name(operation: str, prefix: str | None) -> str:
    """The served name: the operation for the first bundle, ``PREFIX-OPERATION`` for others."""
    return operation if prefix is None else f"{prefix}-{operation}"
