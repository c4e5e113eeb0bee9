"""What the encoder sees of a picture: the whole original, upright, in a square.

The likelihood sees a picture at the model's few pixels, cropped to their shape, where small damage
is gone. So an encoder gets a view of the original instead, of which nothing is cropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ade_base.pictures.ignored import Ignored

STRIDE = 16  # pixels of the view per side of one patch
SMALL, LARGE = 128, 224  # pixels per side, for pictures of the model's size and for others


@dataclass(frozen=True)
class View:
    """A picture as the encoder sees it.

    Attributes:
        pixels: uint8 ``(S, S, 3)``; beside the picture, its mean colour.
        box: ``(top, left, height, width)`` of the picture in it.
        original: ``(height, width)`` of the original.
        hidden: bool ``(S / 16, S / 16)``, patches that are ignored; ``None`` without any.
    """

    pixels: np.ndarray
    box: tuple[int, int, int, int]
    original: tuple[int, int]
    hidden: np.ndarray | None = None

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

    @property
    def seen(self) -> np.ndarray:
        """The patches inside that are not ignored; if all are, those inside."""
        seen: np.ndarray = self.inside
        if self.hidden is not None:
            seen = seen & ~self.hidden
        return seen if seen.any() else self.inside


@dataclass(frozen=True)
class Look:
    """How to look at pictures.

    Attributes:
        size: pixels per side of the view, a multiple of 32; 0 if no encoder looks.
        ignored: what is filled before anything looks; ``None`` for nothing.
    """

    size: int = LARGE
    ignored: Ignored | None = None

    def of(self, original: np.ndarray) -> View:
        """The view of a picture, uint8 ``(H, W, 3)`` or grey, ``(H, W, 1)``, filled already."""
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
        if (rows, columns) != pixels.shape[:2]:
            pixels[:] = np.rint(shown.mean((0, 1)))
        top, left = (self.size - rows) // 2, (self.size - columns) // 2
        pixels[top : top + rows, left : left + columns] = shown
        box = top, left, rows, columns
        return View(pixels, box, (height, width), self._hidden(box))

    def _hidden(self, box: tuple[int, int, int, int]) -> np.ndarray | None:
        if self.ignored is None:
            return None
        top, left, rows, columns = box
        mask = np.ones((self.size, self.size), bool)
        mask[top : top + rows, left : left + columns] = self.ignored.at(rows, columns)
        count = self.size // STRIDE
        return np.asarray(mask.reshape(count, STRIDE, count, STRIDE).all((1, 3)))
