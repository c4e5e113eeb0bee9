"""Options of the workers of a bundle, and the names under which it is served."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServingOptions:
    """How the workers of a bundle compute."""

    backend: str = "onnxruntime"
    device: str = "auto"
    threads: int = 1  # for decoding image files; each worker computes with one thread
    cuda_graphs: bool = False


def served_name(operation: str, prefix: str | None) -> str:
    """The served name: the operation for the first bundle, ``PREFIX-OPERATION`` for others."""
    return operation if prefix is None else f"{prefix}-{operation}"
