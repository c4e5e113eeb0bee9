"""How a bundle is served: by what, and under which names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServingOptions:
    """How the workers of a bundle compute."""

    backend: str = "onnxruntime"
    device: str = "auto"
    threads: int = 1  # of a worker, to decode pictures with; it computes with one
    cuda_graphs: bool = False


def served_name(operation: str, prefix: str | None) -> str:
    """The name under which an operation is served: the first bundle's plain, a further one's
    ``NAME-{op}``.
    """
    return operation if prefix is None else f"{prefix}-{operation}"
