"""Inputs and outputs of a bundle's graphs. The exporter and the engine both use this table.

Inputs and outputs, with levels ``i`` counted from the coarsest:

- ``images``: uint8 ``(N, H, W, C)``; ``u``: float32 of the same shape, uniform on [0, 1). It is the
  position in each pixel's bin, to which ``score`` first applies a learned dequantisation, if any.
- ``eps_i``: standard normal noise, and ``z_i``: latents, both float32 ``(N, c, h, w)``. Noise times
  a temperature samples at that temperature.
- ``y``: features, ``y_eps``: noise of the decoder (zeros give its mean), and ``x``: dequantised
  images, all float32 ``(N, C, H, W)``.

``score`` returns ``parts``, ``(N, 2 + levels)``, and ``cost``, ``(N, 3, H, W)``, the bits of each
pixel, both named in :mod:`serving.verdict.statistics`; and the inputs of the verdict: ``y``,
``residual`` (``y`` standardised by the decoder) and ``surprise_i`` (``z_i`` standardised by its
prior, which ``encode`` answers as ``eps``).
"""

from __future__ import annotations

from collections.abc import Iterable

# The graphs that each operation of the service needs. ``encode`` needs ``score`` for its ``eps``:
# only that graph standardises latents.
OPERATIONS = {
    "sample": ("sample", "decode"),
    "encode": ("encode", "score"),
    "reconstruct": ("reconstruct",),
    "score": ("score",),
}


def needed_by(operations: Iterable[str]) -> list[str]:
    """Names of the graphs that operations need, each once."""
    return list(dict.fromkeys(graph for operation in operations for graph in OPERATIONS[operation]))


def graphs_of(operations: Iterable[str]) -> list[str]:
    """Names of the graphs in a bundle with these operations: theirs, and both flow directions."""
    return [*needed_by(operations), "flow_forward", "flow_inverse"]


def inputs_of(graph: str, levels: int) -> list[str]:
    """Names of a graph's inputs, in order, for a model with this number of latent levels."""
    eps = [f"eps_{i}" for i in range(levels)]
    z = [f"z_{i}" for i in range(levels)]
    return {
        "sample": [*eps, "y_eps"],
        "decode": [*z, "y_eps"],
        "encode": ["images", *eps],
        "flow_forward": ["images", "u"],
        "flow_inverse": ["y"],
        "reconstruct": ["images", *eps, "y_eps"],
        "score": ["images", "u", *eps],
    }[graph]


def outputs_of(graph: str, levels: int) -> list[str]:
    """Names of a graph's outputs, in order."""
    each = [f"{name}_{i}" for name in ("mean", "log_scale", "z") for i in range(levels)]
    return {
        "encode": each,
        "flow_forward": ["y", "log_det_jacobian"],
        "flow_inverse": ["x"],
        "score": ["parts", "cost", "y", "residual", *(f"surprise_{i}" for i in range(levels))],
        "reconstruct": ["reconstruction"],
    }.get(graph, ["images"])


def input_shape(
    name: str, image_shape: tuple[int, int, int], latent_shapes: list[tuple[int, int, int]]
) -> tuple[int, int, int]:
    """Shape of an input for one image, without ``N``; ``image_shape`` is ``(H, W, C)``."""
    height, width, channels = image_shape
    if name in ("images", "u"):
        return image_shape
    if name in ("y", "y_eps"):
        return channels, height, width
    return latent_shapes[int(name.rsplit("_", 1)[1])]
