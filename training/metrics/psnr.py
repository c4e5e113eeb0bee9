"""How close reconstructions come to their images."""

from __future__ import annotations

import numpy as np


def psnr(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image, dB; infinite where nothing differs.

    Args:
        images: uint8 ``(N, H, W, C)``.
        reconstructions: likewise.

    Returns:
        float64 ``(N,)``.
    """
    if images.shape != reconstructions.shape or images.ndim != 4:
        raise ValueError(
            f"both must be the same (N, H, W, C), got {images.shape} and {reconstructions.shape}"
        )
    error = np.square(images.astype(np.float64) - reconstructions).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error)
