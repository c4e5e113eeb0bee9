"""Differentiable augmentation of a discriminator's input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NUMBERS = 5  # random numbers per image
MAX_SHIFT = 0.125  # of the image's side
GREY = 0.5


def augment(x: Tensor, uniform: Tensor) -> Tensor:
    """Change brightness, saturation and contrast, and shift the image on a grey background.

    Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", 2020, section 3.2.
    Real and generated images must both be augmented, or the generator learns to make augmented
    images.

    Args:
        x: ``(N, C, H, W)`` in [0, 1].
        uniform: ``(N, 5)``, random numbers on [0, 1).

    Returns:
        ``(N, C, H, W)``; values may be outside [0, 1].
    """
    brightness, saturation, contrast, right, down = uniform.unbind(1)
    x = x + (brightness[:, None, None, None] - 0.5) / 2
    x = x.mean(1, keepdim=True).lerp(x, 2 * saturation[:, None, None, None])
    x = x.mean((1, 2, 3), keepdim=True).lerp(x, 0.5 + contrast[:, None, None, None])
    shifts = torch.stack([right, down], 1)
    pixels = ((2 * shifts - 1) * (MAX_SHIFT * x.shape[-1] + 0.5)).round()
    theta = torch.cat(
        [torch.eye(2, device=x.device).expand(len(x), 2, 2), 2 * pixels[:, :, None] / x.shape[-1]],
        dim=2,
    )
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return (
        F.grid_sample(x - GREY, grid, mode="nearest", padding_mode="zeros", align_corners=False)
        + GREY
    )
