"""Held-out bits per dimension, samples and reconstructions of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ade_model.likelihood import bits_per_dim, importance_weighted_bound
from ade_model.model import ADEModel
from ade_model.quantization import quantize
from serving.images import tile

BATCH = 128


def _noise(model: ADEModel, n: int, generator: torch.Generator) -> list[Tensor]:
    return [
        torch.randn(n, *shape, generator=generator, device=generator.device)
        for shape in model.config.latent_shapes
    ]


def _to_model(images: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float()


def _to_images(x: Tensor) -> np.ndarray:
    return quantize(x).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _batches(images: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(images), BATCH):
        yield images[first : first + BATCH]


@torch.no_grad()
def bits_of(
    model: ADEModel, images: np.ndarray, device: torch.device, samples: int, seed: int = 0
) -> np.ndarray:
    """Bound the bits per dimension of each image.

    Args:
        model: in evaluation mode, float32.
        images: uint8 ``(N, H, W, C)``.
        device: of the model.
        samples: number of draws: 1 for the ELBO, more for the importance-weighted bound. Each draw
            has its own dequantisation.
        seed: of the noise.

    Returns:
        float64 ``(N,)``.
    """
    generator = torch.Generator(device).manual_seed(seed)
    out = []
    for batch in _batches(images):
        pixels = _to_model(batch, device)
        weights = []
        for _ in range(samples):
            u = torch.rand(pixels.shape, generator=generator, device=device)
            eps = _noise(model, len(u), generator)
            weights.append(model.evidence(model.dequantize(pixels, u), eps).log_weight.double())
        out.append(
            bits_per_dim(importance_weighted_bound(torch.stack(weights)), model.config.num_dims)
        )
    return torch.cat(out).cpu().numpy()


def evaluate(
    model: ADEModel,
    images: np.ndarray,
    device: torch.device,
    samples: int,
    seed: int = 0,
    bound_images: int | None = None,
) -> dict[str, Any]:
    """Mean bits per dimension by ELBO and IWAE-K, with standard errors over images.

    Args:
        model: in evaluation mode, float32.
        images: uint8 ``(N, H, W, C)``.
        device: of the model.
        samples: K of IWAE-K.
        seed: of the noise.
        bound_images: number of images for IWAE-K, the first ones; ``None`` for all.

    Returns:
        By ``elbo`` and ``iwae-K``: ``bpd``, ``standard_error`` and ``images``; for ``iwae-K`` also
        ``elbo``, the bits per dimension of the same images by the ELBO.
    """
    elbos = bits_of(model, images, device, 1, seed)
    result: dict[str, Any] = {"elbo": _mean(elbos)}
    if samples > 1:
        bounds = bits_of(model, images[:bound_images], device, samples, seed)
        same = float(elbos[: len(bounds)].mean())
        result[f"iwae-{samples}"] = {**_mean(bounds), "elbo": same}
    return result


def _mean(bpd: np.ndarray) -> dict[str, Any]:
    return {
        "bpd": float(bpd.mean()),
        "standard_error": float(bpd.std(ddof=1) / np.sqrt(len(bpd))),
        "images": len(bpd),
    }


def sample_kinds(model: ADEModel, operations: Sequence[str]) -> tuple[str, ...]:
    """Kinds of samples to show: ``mean``, and ``density`` if the model's sigma was trained.

    Args:
        model: a flow alone has no sigma.
        operations: that the model supports, which may be fewer than its configuration's: a GAN's
            sigma is trained with its inference network.
    """
    return ("mean", "density") if model.config.widths and "score" in operations else ("mean",)


@torch.no_grad()
def sample_images(
    model: ADEModel, n: int, device: torch.device, with_noise: bool, seed: int = 0
) -> np.ndarray:
    """Draw mean samples, or density samples if ``with_noise``, uint8 ``(n, H, W, C)``."""
    generator = torch.Generator(device).manual_seed(seed)
    config = model.config
    out = []
    for first in range(0, n, BATCH):
        count = min(BATCH, n - first)
        eps = _noise(model, count, generator)
        y_eps = None
        if with_noise:
            y_eps = torch.randn(
                count,
                config.channels,
                config.image_size,
                config.image_size,
                generator=generator,
                device=device,
            )
        out.append(_to_images(model.sample(eps, y_eps)))
    return np.concatenate(out)


def sample_grid(model: ADEModel, n: int, device: torch.device, with_noise: bool) -> np.ndarray:
    """Tile samples to one picture, uint8 ``(H, W, C)``."""
    return tile(sample_images(model, n, device, with_noise))


@torch.no_grad()
def reconstructions(model: ADEModel, images: np.ndarray, device: torch.device) -> np.ndarray:
    """Mean reconstructions of uint8 ``(N, H, W, C)``, from the middle of each pixel's bin.

    With a learned dequantisation, from the median of the positions in it.
    """
    generator = torch.Generator(device).manual_seed(0)
    out = []
    for batch in _batches(images):
        pixels = _to_model(batch, device)
        x = model.dequantize(pixels, torch.full_like(pixels, 0.5)).x
        out.append(_to_images(model.reconstruct(x, _noise(model, len(x), generator))))
    return np.concatenate(out)


def reconstruction_grid(model: ADEModel, images: np.ndarray, device: torch.device) -> np.ndarray:
    """Tile images above their mean reconstructions to one picture, uint8 ``(H, W, C)``."""
    made = reconstructions(model, images, device)
    return np.concatenate([tile(np.asarray(images), len(images)), tile(made, len(images))])
