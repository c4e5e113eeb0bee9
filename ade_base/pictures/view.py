"""What the encoder sees of a picture: the whole original, upright, in a square.

The likelihood sees a picture at the model's few pixels, cropped to their shape, where small damage
is gone. So an encoder gets a view of the original instead, of which nothing is cropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

STRIDE = 16  # pixels of the view per side of one patch
SMALL, LARGE = 128, 224  # pixels per side, for pictures of the model's size and for others


@dataclass(frozen=True)
class View:
    """A picture as the encoder sees it.

    Attributes:
        pixels: uint8 ``(S, S, 3)``; beside the picture, its mean colour.
        box: ``(top, left, height, width)`` of the picture in it.
        original: ``(height, width)`` of the original.
    """

    pixels: np.ndarray
    box: tuple[int, int, int, int]
    original: tuple[int, int]

    @property
    def inside(self) -> np.ndarray:
        """The patches whose centres show the picture, bool ``(S / 16, S / 16)``."""
        centres = (np.arange(len(self.pixels) // STRIDE) + 0.5) * STRIDE
        top, left, height, width = self.box
        rows = (centres >= top) & (centres < top + height)
        columns = (centres >= left) & (centres < left + width)
        # A picture that is thinner than a patch may miss all centres.
        rows[int(top + height / 2) // STRIDE] = True
        columns[int(left + width / 2) // STRIDE] = True
        return rows[:, None] & columns


@dataclass(frozen=True)
class Look:
    """How to make views.

    Attributes:
        size: pixels per side of the view, a multiple of 32.
    """

    size: int = LARGE

    def of(self, original: np.ndarray) -> View:
        """The view of a picture, uint8 ``(H, W, 3)`` or grey, ``(H, W, 1)``."""
        height, width, channels = original.shape
        if channels == 1:
            original = np.repeat(original, 3, axis=2)
        scale = self.size / max(height, width)
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
        shown = np.asarray(
            Image.fromarray(np.ascontiguousarray(original)).resize(
                (columns, rows), Image.Resampling.BILINEAR
            )
        )
        pixels = np.empty((self.size, self.size, 3), np.uint8)
        pixels[:] = np.rint(shown.mean((0, 1)))
        top, left = (self.size - rows) // 2, (self.size - columns) // 2
        pixels[top : top + rows, left : left + columns] = shown
        return View(pixels, (top, left, rows, columns), (height, width))
