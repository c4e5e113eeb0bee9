"""Computes a few dozen statistics of an image from one pass of the model and from the pixels.

The likelihood alone detects out-of-distribution images badly: its parts cancel, and simple images
have a high likelihood (Nalisnick et al., "Do Deep Generative Models Know What They Don't Know?",
2019). Each number here is one more way of being unusual: the likelihood's parts; the length of a
lossless code of the pixels (Serrà et al., "Input complexity and out-of-distribution detection with
likelihood-based generative models", 2020); whether what the model leaves unexplained is white
noise; where in the image the bits lie; and plain statistics of pixels, which need no model.
:mod:`serving.verdict.calibration` makes one score of them.

Everything is computed row by row from one image's own values: no number depends on the batch, or
on the order of the array's axes in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ade_base.pictures.show import lossless_bits
from serving.verdict.encoder import PATCH, PICTURE
from serving.verdict.lesson import LESSON
from serving.verdict.semantic import DISTANCE, ENERGY, FEATURES, semantic_statistics

COSTS = ("distortion", "log_det", "latents")


def part_names(levels: int) -> list[str]:
    """Columns of ``parts``, bits per dimension; with ``dequantization`` (8) they sum to bpd."""
    return ["distortion", "log_det", *(f"kl_{i}" for i in range(levels))]


# Descriptions of the families of statistics for people, by the beginnings of their names.
MEANINGS = {
    "log_det_map_": "where in the image the unlikely pixels are",
    "map_": "where in the image the unlikely pixels are",
    "residual_": "detail that the model cannot reproduce",
    "feature_": "fine texture",
    "latent_": "how unusual the overall structure is",
    "pixel_": "colours, contrast and edges",
    "kl_": "how unusual the overall structure is",
    "bpd": "bits per dimension",
    "distortion": "detail that the model cannot reproduce",
    "log_det": "fine texture",
    "complexity": "size after lossless compression",
    "excess": "bits per dimension compared with lossless compression",
    DISTANCE: "what the image shows: unlike anything seen if high",
    ENERGY: "what the image shows: like none of the classes if high",
    PICTURE: "what the whole picture shows: unlike anything seen if high",
    PATCH: "a part of the picture: unlike any part seen if high",
    LESSON: "like pictures that are known to be bad if high",
}
PIXEL_PREFIX = "pixel_"
BLOCKS = 4  # cells per side, for the unevenness of noise
LOW = 0.02  # fraction of a map: its cheapest pixels


def meaning(statistic: str) -> str:
    """Describe the family of a statistic."""
    return next(words for start, words in MEANINGS.items() if statistic.startswith(start))


def compute_statistics(
    images: np.ndarray, outputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Compute all statistics of a batch.

    Args:
        images: uint8 ``(N, H, W, C)``.
        outputs: of the ``score`` graph for them, see :mod:`serving.engine.signatures`; of the
            ``features`` graph as well, if the bundle has one.

    Returns:
        float32 ``(N,)`` by name, always in the same order. With a ``features`` graph, those of
        :func:`serving.verdict.semantic.semantic_statistics` are among them, from which a
        calibration computes the semantic coordinates.
    """
    images = np.ascontiguousarray(images)  # NumPy adds in the order of memory
    parts = outputs["parts"].astype(np.float64)
    levels = parts.shape[1] - 2
    found = {"bpd": 8.0 + parts.sum(1)}
    found |= dict(zip(part_names(levels), parts.T, strict=True))
    found["complexity"] = np.array([lossless_bits(image) for image in images])
    found["excess"] = found["bpd"] - found["complexity"]
    found |= _of_pixels(images)
    found |= _of_noise(outputs["residual"])
    found |= _of_features(outputs["y"])
    for i in range(levels):
        found[f"latent_{i}_energy"] = _log(_mean(np.square(outputs[f"surprise_{i}"])))
    cost = outputs["cost"]
    bits = cost[:, 0]
    for i in range(1, len(COSTS)):
        bits = bits + cost[:, i]
    found |= _of_map("map", bits)
    found["map_low"] = np.quantile(bits.reshape(len(bits), -1), LOW, axis=1)
    found["map_follows_edges"] = _correlation(bits, _edges(images))
    found |= _of_map("log_det_map", cost[:, COSTS.index("log_det")])
    if FEATURES in outputs:
        found |= semantic_statistics(outputs)
    return {name: values.astype(np.float32) for name, values in found.items()}


def finite_rows(statistics: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which images have finite statistics only, bool ``(N,)``."""
    return np.all(
        [np.isfinite(values.reshape(len(values), -1)).all(1) for values in statistics.values()],
        axis=0,
    )


def statistic_names(
    image_shape: tuple[int, int, int], latent_shapes: Sequence[tuple[int, int, int]]
) -> list[str]:
    """Names of the statistics of a model: :func:`compute_statistics` of zeros gives them."""
    height, width, channels = image_shape
    outputs: dict[str, np.ndarray] = {
        "parts": np.zeros((1, 2 + len(latent_shapes))),
        "cost": np.zeros((1, len(COSTS), height, width)),
        **{name: np.zeros((1, channels, height, width), np.float32) for name in ("y", "residual")},
        **{
            f"surprise_{i}": np.zeros((1, *shape), np.float32)
            for i, shape in enumerate(latent_shapes)
        },
    }
    return list(compute_statistics(np.zeros((1, *image_shape), np.uint8), outputs))


def _mean(values: np.ndarray) -> np.ndarray:
    """``(N, ...)`` to ``(N,)``."""
    return values.reshape(len(values), -1).mean(1)


def _log(values: np.ndarray, floor: float = 1e-8) -> np.ndarray:
    return np.log(values + np.float32(floor))


def _lag(centred: np.ndarray, axis: int, lag: int) -> np.ndarray:
    """Mean product of values ``lag`` apart along an axis."""
    here, there = [slice(None)] * centred.ndim, [slice(None)] * centred.ndim
    here[axis], there[axis] = slice(lag, None), slice(None, -lag)
    return _mean(centred[tuple(here)] * centred[tuple(there)])


def _lags(size: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys((1, 2, max(1, size // 8), max(1, size // 4))))


def _of_pixels(images: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of uint8 ``(N, H, W, C)``: colours, contrast, edges, smoothness, clipping."""
    values = images.astype(np.float32).transpose(0, 3, 1, 2) / np.float32(255)
    channels = range(values.shape[1])
    means = values.mean((2, 3), keepdims=True)
    centred = values - means
    variances = np.square(centred).mean((2, 3))
    variance = variances.mean(1) + np.float32(1e-9)
    found = {f"pixel_mean_{c}": means[:, c, 0, 0] for c in channels}
    found |= {f"pixel_contrast_{c}": _log(np.sqrt(variances[:, c]), 1e-3) for c in channels}
    if len(channels) > 1:
        colour = values - values.mean(1, keepdims=True)
        found["pixel_chroma"] = _log(np.sqrt(_mean(np.square(colour))), 1e-3)
        for c in channels[:-1]:
            found[f"pixel_channels_{c}"] = _mean(centred[:, c] * centred[:, c + 1]) / variance
    across, down = np.diff(values, axis=3), np.diff(values, axis=2)
    found["pixel_edges_across"] = _log(_mean(np.abs(across)), 1e-4)
    found["pixel_edges_down"] = _log(_mean(np.abs(down)), 1e-4)
    found["pixel_edges_diagonal"] = _log(
        _mean(np.abs(values[:, :, 1:, 1:] - values[:, :, :-1, :-1])), 1e-4
    )
    found["pixel_detail"] = _log(
        _mean(
            np.abs(
                across[:, :, 1:-1, 1:]
                - across[:, :, 1:-1, :-1]
                + down[:, :, 1:, 1:-1]
                - down[:, :, :-1, 1:-1]
            )
        ),
        1e-4,
    )
    squares = np.square(across)
    found["pixel_edges_kurtosis"] = _log(
        _mean(np.square(squares)) / (np.square(_mean(squares)) + np.float32(1e-12)), 1e-3
    )
    for lag in _lags(values.shape[2]):
        found[f"pixel_lag_{lag}"] = (_lag(centred, 2, lag) + _lag(centred, 3, lag)) / (2 * variance)
    for name, level in (("black", 0), ("white", 255)):
        found[f"pixel_{name}"] = np.log1p(
            np.float32(100) * _mean(images == level).astype(np.float32)
        )
    return found


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centred by image, variance and kurtosis (logarithm) of ``(N, ...)``."""
    mean = _mean(values)
    centred = values - mean.reshape(-1, *[1] * (values.ndim - 1))
    squares = np.square(centred)
    variance = _mean(squares) + np.float32(1e-12)
    return centred, variance, _log(_mean(np.square(squares)) / np.square(variance))


def _of_noise(noise: np.ndarray) -> dict[str, np.ndarray]:
    """Distinguish ``(N, C, H, W)`` from white noise of variance 1, which has no correlations."""
    centred, variance, kurtosis = _moments(noise)
    found = {
        "residual_mean": _mean(noise),
        "residual_energy": _log(_mean(np.square(noise))),
        "residual_kurtosis": kurtosis,
        "residual_skewness": np.cbrt(
            _mean(centred * np.square(centred)) / (variance * np.sqrt(variance))
        ),
    }
    energy = np.square(centred).mean(1)
    count, height, width = energy.shape
    blocks = (
        energy[:, : height - height % BLOCKS, : width - width % BLOCKS]
        .reshape(count, BLOCKS, height // BLOCKS, BLOCKS, width // BLOCKS)
        .mean((2, 4))
        .reshape(count, -1)
    )
    found["residual_unevenness"] = _log(blocks.std(1) / (blocks.mean(1) + np.float32(1e-12)), 1e-6)
    found["residual_rows"] = _lag(centred, 2, 1) / variance
    found["residual_columns"] = _lag(centred, 3, 1) / variance
    found["residual_lag_2"] = (_lag(centred, 2, 2) + _lag(centred, 3, 2)) / (2 * variance)
    if noise.shape[1] > 1:
        found["residual_channels"] = _lag(centred, 1, 1) / variance
    found["residual_patches"] = _within_patches(noise)[0]
    return found


def _of_features(y: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of the flow's output, ``(N, C, H, W)``.

    The flow mixes the values of a 2x2 patch, so correlations are those of neighbouring patches.
    """
    _, _, kurtosis = _moments(y)
    mixing, centred, variance = _within_patches(y)
    return {
        "feature_energy": _log(_mean(np.square(y))),
        "feature_kurtosis": kurtosis,
        "feature_patches": mixing,
        "feature_rows": _lag(centred, 2, 1) / variance,
        "feature_columns": _lag(centred, 3, 1) / variance,
    }


def _within_patches(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithm of how much the values of a 2x2 patch vary together; centred values; variance.

    The last row and column of an odd size belong to no patch.
    """
    values = values[:, :, : values.shape[2] // 2 * 2, : values.shape[3] // 2 * 2]
    count, channels, height, width = values.shape
    squeezed = (
        values.reshape(count, channels, height // 2, 2, width // 2, 2)
        .transpose(0, 1, 3, 5, 2, 4)
        .reshape(count, 4 * channels, height // 2, width // 2)
    )
    centred = squeezed - squeezed.mean((2, 3), keepdims=True)
    rows = centred.reshape(count, 4 * channels, -1)
    covariance = rows @ rows.transpose(0, 2, 1) / np.float32(rows.shape[2])
    diagonal = np.square(np.diagonal(covariance, axis1=1, axis2=2)).sum(1)
    off = np.square(covariance).reshape(count, -1).sum(1) - diagonal
    return (
        _log(np.maximum(off, 0) / (diagonal + np.float32(1e-12))),
        centred,
        _mean(np.square(centred)) + np.float32(1e-8),
    )


def _of_map(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """How unevenly ``(N, H, W)`` is distributed, and how alike it is at several distances."""
    centred, variance, kurtosis = _moments(values)
    far = max(2, values.shape[1] // 8)
    return {
        f"{name}_spread": _log(variance) / 2,
        f"{name}_kurtosis": kurtosis,
        **{
            f"{name}_{lag}": (_lag(centred, 1, distance) + _lag(centred, 2, distance))
            / (2 * variance)
            for lag, distance in (("near", 1), ("far", far))
        },
    }


def _edges(images: np.ndarray) -> np.ndarray:
    """Logarithm of how much each pixel differs from the next ones, ``(N, H, W)``."""
    grey = images.astype(np.float32).mean(3)
    down = np.abs(np.diff(grey, axis=1, append=grey[:, -1:]))
    across = np.abs(np.diff(grey, axis=2, append=grey[:, :, -1:]))
    return np.log1p(across + down)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a = a - _mean(a)[:, None, None]
    b = b - _mean(b)[:, None, None]
    return _mean(a * b) / np.sqrt(_mean(np.square(a)) * _mean(np.square(b)) + np.float32(1e-9))
