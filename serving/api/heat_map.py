"""The bits of each pixel as a picture."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

HEAT_MAP_SCALE = 8  # picture pixels per side of an image pixel
COLD, MIDDLE, HOT = "#0d1b4c", "#c2416b", "#ffe98a"


def heat_map(bits: np.ndarray) -> np.ndarray:
    """Colour each pixel by its bits: dark for few, bright for many.

    Args:
        bits: of each pixel, ``(H, W)``; its 1st and 99th percentile are the ends of the colours.

    Returns:
        uint8 ``(8 H, 8 W, 3)``.
    """
    low, high = np.percentile(bits, (1, 99))
    grey = np.clip(255 * (bits - low) / max(high - low, 1e-9), 0, 255).astype(np.uint8)
    picture = ImageOps.colorize(Image.fromarray(grey), COLD, HOT, MIDDLE)
    return np.asarray(
        picture.resize(
            (bits.shape[1] * HEAT_MAP_SCALE, bits.shape[0] * HEAT_MAP_SCALE),
            Image.Resampling.NEAREST,
        )
    )
