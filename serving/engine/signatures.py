"""What the graphs of a bundle take and give: one table that the exporter writes by and the engine
reads by.

Names: ``images`` uint8 ``(N, H, W, C)``; ``u`` float32 of that shape, uniform on [0, 1); ``eps_i``
standard normal and ``z_i`` latents, float32 ``(N, c, h, w)`` of level ``i``, coarsest first; ``y``
features, ``y_eps`` the decoder's noise and ``x`` dequantised images, float32 ``(N, C, H, W)``.
``y_eps`` of zeros gives the mean, ``eps`` scaled by a temperature samples at that temperature.

``score`` gives ``parts``, ``(N, 2 + levels)``, see ``part_names``; ``cost``, ``(N, 3, H, W)``, bits
that each pixel adds, by ``COSTS``; and what the verdict is made of: ``y``, ``residual`` (``y``
standardised by the decoder) and ``surprise_i`` (``z_i`` standardised by its prior).
"""

from __future__ import annotations

from collections.abc import Iterable

# The graphs that each operation of the service needs.
# ``encode`` has the noise that samples an image again from ``score``, which standardises latents.
OPERATIONS = {
    "sample": ("sample", "decode"),
    "encode": ("encode", "score"),
    "reconstruct": ("reconstruct",),
    "score": ("score",),
}


def graphs_of(operations: Iterable[str]) -> list[str]:
    """Names of the graphs that a bundle with these operations holds: theirs, and the flow both
    ways.
    """
    own = [graph for operation in operations for graph in OPERATIONS[operation]]
    return [*dict.fromkeys(own), "flow_forward", "flow_inverse"]


def inputs_of(graph: str, levels: int) -> list[str]:
    """Names of a graph's inputs, in order, for a model with so many latent levels."""
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
    """Shape of one image's share of an input; ``image_shape`` is ``(H, W, C)``."""
    height, width, channels = image_shape
    if name in ("images", "u"):
        return image_shape
    if name in ("y", "y_eps"):
        return channels, height, width
    return latent_shapes[int(name.rsplit("_", 1)[1])]
