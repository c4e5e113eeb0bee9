"""Comparison of exported graphs with the eager model in float64.

Both formats are compared at three batch sizes, on ordinary and on extreme images.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ade_model.config import OPERATIONS
from ade_model.model import ADEModel
from ade_model.quantization import dequantize
from export.graphs import Graph, Graphs
from serving.engine.backends import Backend
from serving.engine.noise import NoiseStream, sample_key
from serving.engine.signatures import graphs_of, input_shape, inputs_of, outputs_of

BATCHES = (1, 7, 64)
MAX_BPD = 1e-4  # bits per dimension; in proportion for parts above LARGE_BPD
LARGE_BPD = 100.0
PIXELS = ("images", "reconstruction")
MAX_ROUND_TRIP = 0.01  # grey levels
MAX_PIXELS_OFF = 1e-4  # fraction of pixel values that may be one level apart
MAX_VALUES_OFF = 3  # or this number of them: in a small model's few values, chance alone gives that
MAX_LATENT = 1e-3  # for means, log-scales, draws and features, relative to 1 + their size


class ParityError(RuntimeError):
    """The outputs of an exported graph differ from those of the model."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of an output over all batches and images.

    For pixels it is the share of values that differ.
    """

    graph: str
    output: str
    backend: str
    value: float
    limit: float
    unit: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "graph": self.graph,
            "output": self.output,
            "backend": self.backend,
            "difference": self.value,
            "limit": self.limit,
            "unit": self.unit,
        }


def probe_images(real: np.ndarray, image_shape: tuple[int, int, int]) -> np.ndarray:
    """64 images to compare on: real ones, constants, extremes and noise.

    Args:
        real: uint8 ``(N, H, W, C)``; the first 40 are used.
        image_shape: ``(H, W, C)``.
    """
    height, width, channels = image_shape
    constants = [np.full(image_shape, level, np.uint8) for level in (0, 1, 64, 127, 128, 254, 255)]
    checks = np.indices((height, width)).sum(0) % 2
    extremes = [
        np.repeat((checks * 255).astype(np.uint8)[:, :, None], channels, 2),
        np.repeat(
            ((np.arange(width) // (width // 2)) * 255)
            .astype(np.uint8)[None, :, None]
            .repeat(height, 0),
            channels,
            2,
        ),
    ]
    stream = NoiseStream(sample_key(0, 0))
    count = 64 - min(40, len(real)) - len(constants) - len(extremes)
    noise = [(stream.uniform(image_shape) * 256).astype(np.uint8) for _ in range(count)]
    return np.stack([*real[:40], *constants, *extremes, *noise])


def make_inputs(
    images: np.ndarray, latent_shapes: list[tuple[int, int, int]], names: list[str]
) -> dict[str, np.ndarray]:
    """Fixed images and noise for each of the named inputs."""
    image_shape = (images.shape[1], images.shape[2], images.shape[3])
    result = {}
    for name in names:
        if name == "images":
            result[name] = images
            continue
        shape = input_shape(name, image_shape, latent_shapes)
        streams = [
            NoiseStream(hashlib.sha256(f"parity {name} {i}".encode()).digest()[:16])
            for i in range(len(images))
        ]
        result[name] = np.stack(
            [s.uniform(shape) if name == "u" else s.normal(shape) for s in streams]
        )
    return result


def check_parity(
    model: ADEModel,
    backends: dict[str, Backend],
    real: np.ndarray,
    operations: Sequence[str] = OPERATIONS,
) -> list[Difference]:
    """Compare every output of every graph.

    Args:
        model: float32, on the CPU.
        backends: to compare, by a name for the result.
        real: uint8 ``(N, H, W, C)``, held-out images.
        operations: of the bundle.

    Returns:
        The largest difference for each output and backend.

    Raises:
        ParityError: a difference is above its limit; the message names the output.
    """
    reference = Graphs(copy.deepcopy(model).double())
    config = model.config
    images = probe_images(real, (config.image_size, config.image_size, config.channels))
    worst: dict[tuple[str, str, str], Difference] = {}
    pixels: dict[
        tuple[str, str, str], tuple[float, int]
    ] = {}  # values one level apart, of how many
    for graph in graphs_of(operations):
        for batch in BATCHES:
            inputs = _inputs(
                graph, images[:batch] if batch > 1 else images[-1:], config.latent_shapes, reference
            )
            expected = _eager(reference, graph, inputs)
            for label, backend in backends.items():
                found = backend.run(graph, inputs)
                for name in outputs_of(graph, reference.levels):
                    key = (graph, name, label)
                    if name in PIXELS:
                        apart, count = pixels.get(key, (0.0, 0))
                        pixels[key] = (
                            apart + _apart(*key, expected[name], found[name]),
                            count + found[name].size,
                        )
                        share = pixels[key][0] / pixels[key][1]
                        worst[key] = Difference(
                            *key,
                            share,
                            max(MAX_PIXELS_OFF, (MAX_VALUES_OFF + 0.5) / pixels[key][1]),
                            "of the values one level apart",
                        )
                        continue
                    difference = _difference(
                        graph, name, label, expected[name], found[name], config.num_dims
                    )
                    _raise_if_above(difference)  # before a NaN is lost in the comparison below
                    if key not in worst or difference.value > worst[key].value:
                        worst[key] = difference
    for label, backend in backends.items():
        worst["round trip", "x", label] = _round_trip(backend, label, images, config.latent_shapes)
    table = list(worst.values())
    for row in table:
        _raise_if_above(row)
    return table


def _raise_if_above(row: Difference) -> None:
    if not row.value <= row.limit:
        raise ParityError(
            f"{row.backend}: output {row.output} of {row.graph} differs from eager float64 by "
            f"{row.value:.3g} {row.unit}; at most {row.limit:g} is allowed"
        )


def _inputs(
    graph: str, images: np.ndarray, latent_shapes: list[tuple[int, int, int]], reference: Graphs
) -> dict[str, np.ndarray]:
    """Inputs of a graph: noise, or latents and features of real images."""
    names = inputs_of(graph, len(latent_shapes))
    inputs = make_inputs(
        images, latent_shapes, [n for n in names if n != "y" and not n.startswith("z_")]
    )
    if graph == "decode" and not reference.model.config.encoder:
        prior = make_inputs(images, latent_shapes, inputs_of("sample", len(latent_shapes)))
        inputs |= {n: prior[n.replace("z_", "eps_")] for n in names if n.startswith("z_")}
    elif graph == "decode":
        encode = make_inputs(images, latent_shapes, inputs_of("encode", len(latent_shapes)))
        encoded = _eager(reference, "encode", encode)
        inputs |= {n: encoded[n].astype(np.float32) for n in names if n.startswith("z_")}
    if graph == "flow_inverse":
        forward = make_inputs(images, latent_shapes, inputs_of("flow_forward", len(latent_shapes)))
        inputs["y"] = _eager(reference, "flow_forward", forward)["y"].astype(np.float32)
    return {n: inputs[n] for n in names}


def _eager(reference: Graphs, graph: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = [torch.from_numpy(v) for v in inputs.values()]
    with torch.inference_mode():
        values = Graph(reference, graph)(
            *(t if t.dtype == torch.uint8 else t.double() for t in tensors)
        )
    values = values if isinstance(values, tuple) else (values,)
    return {n: v.numpy() for n, v in zip(outputs_of(graph, reference.levels), values, strict=True)}


def _gap(
    graph: str, output: str, backend: str, expected: np.ndarray, found: np.ndarray
) -> np.ndarray:
    if found.shape != expected.shape:
        raise ParityError(
            f"{backend}: output {output} of {graph} has shape {found.shape}, not {expected.shape}"
        )
    return np.abs(expected.astype(np.float64) - found.astype(np.float64))


def _apart(graph: str, output: str, backend: str, expected: np.ndarray, found: np.ndarray) -> float:
    """Number of pixel values that are one level apart; infinite if one is further apart."""
    gap = _gap(graph, output, backend, expected, found)
    return float((gap > 0).sum()) if gap.max() <= 1 else float("inf")


def _difference(
    graph: str, output: str, backend: str, expected: np.ndarray, found: np.ndarray, num_dims: int
) -> Difference:
    gap = _gap(graph, output, backend, expected, found)
    if output == "parts":
        # Scores far above those of photographs (a one-pixel checkerboard has 500 bpd) are compared
        # relative to their size, since float32 has seven digits.
        size = np.maximum(1, np.abs(expected).max(1) / LARGE_BPD)
        total = np.abs(expected.sum(1) - found.astype(np.float64).sum(1))
        worst = float((np.maximum(total, gap.max(1)) / size).max())
        return Difference(graph, output, backend, worst, MAX_BPD, "bits per dimension")
    if output == "cost":  # compared pixel by pixel; its sums have the limit of the score's parts
        place = gap / (1 + np.abs(expected).max((1, 2, 3), keepdims=True))
        _raise_if_above(
            Difference(
                graph, output, backend, float(place.max()), MAX_LATENT, "relative, of a pixel"
            )
        )
        total = np.abs((found.astype(np.float64) - expected).sum((2, 3))).max(1) / num_dims
        size = np.maximum(1, np.abs(expected).sum((1, 2, 3)) / num_dims / LARGE_BPD)
        return Difference(
            graph, output, backend, float((total / size).max()), MAX_BPD, "bits per dimension"
        )
    if output == "log_det_jacobian":
        return Difference(
            graph,
            output,
            backend,
            float(gap.max() / (num_dims * np.log(2))),
            MAX_BPD,
            "bits per dimension",
        )
    return Difference(
        graph, output, backend, float((gap / (1 + np.abs(expected))).max()), MAX_LATENT, "relative"
    )


def _round_trip(
    backend: Backend, label: str, images: np.ndarray, latent_shapes: list[tuple[int, int, int]]
) -> Difference:
    inputs = make_inputs(images, latent_shapes, ["images", "u"])
    y = backend.run("flow_forward", inputs)["y"]
    x = backend.run("flow_inverse", {"y": y})["x"]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    expected = dequantize(
        pixels, torch.from_numpy(inputs["u"]).permute(0, 3, 1, 2).double()
    ).numpy()
    levels = float(np.abs(x.astype(np.float64) - expected).max() * 256)
    return Difference("round trip", "x", label, levels, MAX_ROUND_TRIP, "grey levels")
