"""Checks that the exported graphs compute what the model computes.

Compares both formats with the model in float64, at three batch sizes, on easy and hard images.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ade_base.errors import UserError
from ade_model.config import OPERATIONS
from ade_model.model import ADEModel
from ade_model.quantization import dequantize
from export.graphs import Graph, Graphs
from serving.engine.backends import Backend
from serving.engine.noise import NoiseStream, sample_key
from serving.engine.signatures import graphs_of, input_shape, inputs_of, outputs_of
from training.data import Dataset

BATCHES = (1, 7, 64)
REAL_IMAGES = 40  # of the 64
# Values of each pixel output to compare, in further batches if need be: enough that chance does not
# decide about a share near the limit.
MIN_PIXEL_VALUES = 500_000
MAX_BPD = 1e-4  # and in proportion for parts above LARGE_BPD, to which no photograph comes
LARGE_BPD = 25.0
PIXELS = ("images", "reconstruction")
MAX_ROUND_TRIP = 0.01  # grey levels
MAX_PIXELS_OFF = 1e-4  # share of all values that may be one level apart
MAX_LATENT = 1e-3  # of means, log-scales, draws and features: relative to 1 + their size


class ParityError(UserError, RuntimeError):
    """An exported graph does not compute what the model computes."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of one output over all batches and images.

    For pixels, the share of values that differ.
    """

    graph: str
    output: str
    backend: str
    difference: float
    limit: float
    unit: str


def parity_images(dataset: Dataset) -> np.ndarray:
    """Real images for :func:`check_parity`, held-out ones first: it is no statistic of them."""
    parts = [dataset.parts[part].images[:REAL_IMAGES] for part in ("select", "train")]
    return np.concatenate(parts)[:REAL_IMAGES]


def probe_images(real: np.ndarray, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Return 64 images chosen to reveal errors: real ones, constants, extremes and noise.

    Args:
        real: uint8 ``(N, H, W, C)``; only the first :data:`REAL_IMAGES` are used.
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
    count = 64 - min(REAL_IMAGES, len(real)) - len(constants) - len(extremes)
    noise = [(stream.uniform(image_shape) * 256).astype(np.uint8) for _ in range(count)]
    return np.stack([*real[:REAL_IMAGES], *constants, *extremes, *noise])


def make_inputs(
    images: np.ndarray, latent_shapes: list[tuple[int, int, int]], names: list[str], first: int = 0
) -> dict[str, np.ndarray]:
    """Return the named inputs for a batch of images: the images themselves, and noise.

    Args:
        images: uint8 ``(N, H, W, C)``.
        latent_shapes: ``(channels, height, width)`` per level.
        names: inputs of a graph.
        first: number of the first image. Each number has noise of its own.
    """
    image_shape = (images.shape[1], images.shape[2], images.shape[3])
    result = {}
    for name in names:
        if name == "images":
            result[name] = images
            continue
        shape = input_shape(name, image_shape, latent_shapes)
        streams = [
            NoiseStream(hashlib.sha256(f"parity {name} {i}".encode()).digest()[:16])
            for i in range(first, first + len(images))
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
    """Compare every output of every graph with the model in float64.

    Args:
        model: float32, on the CPU.
        backends: the backends to check, by their name in the result.
        real: uint8 ``(N, H, W, C)``, held-out images.
        operations: the operations of the bundle.

    Returns:
        One row per output and backend.

    Raises:
        ParityError: an output differs too much; the error names the output and the difference.
    """
    reference = Graphs(copy.deepcopy(model).double())
    config = model.config
    images = probe_images(real, (config.image_size, config.image_size, config.channels))
    worst: dict[tuple[str, str, str], Difference] = {}
    # The number of values that are one level apart, and of all values.
    pixels: dict[tuple[str, str, str], tuple[float, int]] = {}
    for graph in graphs_of(operations):
        batches = [images[:batch] if batch > 1 else images[-1:] for batch in BATCHES]
        if set(PIXELS) & set(outputs_of(graph, reference.levels)):
            batches += [images] * _num_further_batches(batches, images)
        for i, batch in enumerate(batches):
            # The first batches share their noise; further ones repeat the images with new noise.
            first = max(0, i + 1 - len(BATCHES)) * len(images)
            inputs = _inputs(graph, batch, config.latent_shapes, reference, first)
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
                            *key, share, MAX_PIXELS_OFF, "of the values one level apart"
                        )
                        continue
                    row = _difference(
                        graph, name, label, expected[name], found[name], config.num_dims
                    )
                    _raise_if_above(row)  # here, because NaN would never be the largest
                    if key not in worst or row.difference > worst[key].difference:
                        worst[key] = row
    for label, backend in backends.items():
        worst["round trip", "x", label] = _round_trip(backend, label, images, config.latent_shapes)
    table = list(worst.values())
    for row in table:
        _raise_if_above(row)
    return table


def _num_further_batches(batches: list[np.ndarray], images: np.ndarray) -> int:
    """How many more batches of ``images`` give :data:`MIN_PIXEL_VALUES` values."""
    return max(0, math.ceil((MIN_PIXEL_VALUES - sum(b.size for b in batches)) / images.size))


def _raise_if_above(row: Difference) -> None:
    if not row.difference <= row.limit:
        raise ParityError(
            f"{row.backend}: output {row.output} of {row.graph} differs from eager float64 by "
            f"{row.difference:.3g} {row.unit}; at most {row.limit:g} is allowed"
        )


def _inputs(
    graph: str,
    images: np.ndarray,
    latent_shapes: list[tuple[int, int, int]],
    reference: Graphs,
    first: int,
) -> dict[str, np.ndarray]:
    """Return noise for most inputs, and latents and features of the images for ``z`` and ``y``."""
    levels = len(latent_shapes)
    names = inputs_of(graph, levels)
    inputs = make_inputs(
        images, latent_shapes, [n for n in names if n != "y" and not n.startswith("z_")], first
    )
    if graph == "decode" and not reference.model.config.encoder:
        prior = make_inputs(images, latent_shapes, inputs_of("sample", levels), first)
        inputs |= {n: prior[n.replace("z_", "eps_")] for n in names if n.startswith("z_")}
    elif graph == "decode":
        encode = make_inputs(images, latent_shapes, inputs_of("encode", levels), first)
        encoded = _eager(reference, "encode", encode)
        inputs |= {n: encoded[n].astype(np.float32) for n in names if n.startswith("z_")}
    if graph == "flow_inverse":
        forward = make_inputs(images, latent_shapes, inputs_of("flow_forward", levels), first)
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
    """Count the values that are one level apart; infinity if any differs by more."""
    gap = _gap(graph, output, backend, expected, found)
    return float((gap > 0).sum()) if gap.max() <= 1 else float("inf")


def _difference(
    graph: str, output: str, backend: str, expected: np.ndarray, found: np.ndarray, num_dims: int
) -> Difference:
    gap = _gap(graph, output, backend, expected, found)
    if output == "parts":
        # Float32 has seven digits. For scores far above those of photographs (a one-pixel
        # checkerboard has 500 bpd) the limit is relative.
        size = np.maximum(1, np.abs(expected).max(1) / LARGE_BPD)
        total = np.abs(expected.sum(1) - found.astype(np.float64).sum(1))
        worst = float((np.maximum(total, gap.max(1)) / size).max())
        return Difference(graph, output, backend, worst, MAX_BPD, "bits per dimension")
    if output == "cost":  # each pixel by itself; the sums have the same limit as the score's parts
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
