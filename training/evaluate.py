"""Held-out bits per dimension, samples and reconstructions of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ade_base.pictures.show import psnr, tile
from ade_model.likelihood import bits_per_dim, importance_weighted_bound
from ade_model.model import ADEModel
from ade_model.quantization import quantize

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


def _batch_bpd(
    model: ADEModel, pixels: Tensor, generator: torch.Generator, samples: int
) -> tuple[Tensor, Tensor]:
    """Bits per dimension of a batch: ``pixels -> x -> y -> z -> log-weight -> bound -> bpd``.

    For each of the K draws:

    * ``pixels``, ``(N, C, H, W)``, from 0 to 255, become ``x`` in [0, 1] of the same shape, each
      spread over its bin by uniform noise ``u``.
    * The flow turns ``x`` into ``y``, ``(N, C, H, W)``.
    * The encoder turns ``y`` and standard normal noise ``eps`` into ``z``, one tensor per level,
      ``(N, *latent_shapes[i])``.
    * ``log p(y | z) + log |det dy/dx| - KL`` is the draw's log-weight, ``(N,)``, nats.

    The bound on ``log p(x)``, ``(N,)``, nats, is the log of the mean of the K weights.

    Returns:
        The bits per dimension, ``(N,)``, and their part that is the KL, the mean of the K draws,
        ``(N,)`` for each level, coarsest first; float64.
    """
    log_weights, kls = [], []
    for _ in range(samples):
        u = torch.rand(pixels.shape, generator=generator, device=pixels.device)
        eps = _noise(model, len(u), generator)
        terms = model.elbo_terms(model.dequantize(pixels, u), eps)
        log_weights.append(terms.log_weight.double())
        kls.append(torch.stack(terms.kl).double())
    bound = importance_weighted_bound(torch.stack(log_weights))
    num_dims = model.config.num_dims
    kl = torch.stack(kls).mean(0) / (num_dims * math.log(2.0))
    return bits_per_dim(bound, num_dims), kl


@torch.no_grad()
def _bpd_and_kl_of(
    model: ADEModel, images: np.ndarray, device: torch.device, samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`bpd_of`, with the KL of each level, ``(levels, N)``, in bits per dimension."""
    generator = torch.Generator(device).manual_seed(seed)
    found = [
        _batch_bpd(model, _to_model(batch, device), generator, samples)
        for batch in _batches(images)
    ]
    bpd, kl = (torch.cat(parts, -1).cpu().numpy() for parts in zip(*found, strict=True))
    return bpd, kl


def bpd_of(
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
    return _bpd_and_kl_of(model, images, device, samples, seed)[0]


def likelihood_figures(
    model: ADEModel, images: np.ndarray, device: torch.device, seed: int = 0
) -> dict[str, Any]:
    """Mean bits per dimension by the ELBO and its part that is the KL, for :mod:`ade_base.panel`.

    Args:
        model: in evaluation mode, float32.
        images: uint8 ``(N, H, W, C)``, two or more.
        device: of the model.
        seed: of the noise.

    Returns:
        The figures ``bpd``, with the standard error over images, and ``kl``, with its ``levels``,
        coarsest first.
    """
    bpd, kl = _bpd_and_kl_of(model, images, device, 1, seed)
    error = float(bpd.std(ddof=1) / np.sqrt(len(bpd)))
    figures: dict[str, Any] = {
        "bpd": {"value": float(bpd.mean()), "error": error, "images": len(images)}
    }
    if model.config.widths:
        levels = kl.mean(1).tolist()
        figures["kl"] = {"value": sum(levels), "levels": levels, "images": len(images)}
    else:  # its "KL" would be the code length of ``y``
        figures["kl"] = {"value": None, "note": "the model has no latents"}
    return figures


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


def psnr_figure(model: ADEModel, images: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Mean PSNR of mean reconstructions, dB, as a figure for :mod:`ade_base.panel`.

    Exact reconstructions, which have no PSNR, are only counted.
    """
    decibels = map(psnr, images, reconstructions(model, images, device))
    inexact = [value for value in decibels if value is not None]
    figure: dict[str, Any] = {
        "value": float(np.mean(inexact)) if inexact else None,
        "images": len(images),
    }
    if len(inexact) < len(images):
        figure["note"] = f"{len(images) - len(inexact):,} reconstructions are exact"
    return figure


def reconstruction_grid(model: ADEModel, images: np.ndarray, device: torch.device) -> np.ndarray:
    """Tile images above their mean reconstructions to one picture, uint8 ``(H, W, C)``."""
    made = reconstructions(model, images, device)
    return np.concatenate([tile(np.asarray(images), len(images)), tile(made, len(images))])
