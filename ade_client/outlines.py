"""Draws outlines around the unusual regions of a picture."""

from __future__ import annotations

import numpy as np

from ade_base.pictures.view import LARGE
from ade_client.contract import Regions

COLOURS = (0xD9, 0x2D, 0x0B), (0xFF, 0xFF, 0xFF)  # of an outline, from outside to inside
LINES = 250  # an outline has one pixel for each of these of the picture's longer side


def outlined(picture: np.ndarray, regions: Regions, alpha: float) -> np.ndarray:
    """A picture with outlines around its parts whose p-value is at most ``alpha``.

    Args:
        picture: uint8 ``(H, W, 3)``, the original at any size.
        regions: of the original.
        alpha: at most this share of good pictures has any outline.

    Returns:
        uint8 ``(H', W', 3)``; a small picture is enlarged without smoothing.
    """
    factor = -(-LARGE // max(picture.shape[:2]))
    drawn = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width, _ = drawn.shape
    rows = _cells(height, regions.image_height, regions.top, regions.height, len(regions.p_values))
    columns = _cells(
        width, regions.image_width, regions.left, regions.width, regions.p_values.shape[1]
    )
    unusual = np.pad(regions.p_values <= alpha, 1)  # no cell has the numbers 0 and -1
    inner = np.pad(unusual[np.ix_(rows, columns)], 1)
    line = max(2, max(height, width) // LINES)
    for colour, pixels in zip(COLOURS, (line, line // 2), strict=True):
        outer = inner
        for _ in range(pixels):
            inner = _eroded(inner)
        drawn[(outer & ~inner)[1:-1, 1:-1]] = colour
    return drawn


def _cells(pixels: int, size: int, start: float, length: float, count: int) -> np.ndarray:
    """The cell of each of the pixels along one side, from 1 on; 0 or ``count + 1`` outside."""
    places = (np.arange(pixels) + 0.5) * size / pixels
    cells: np.ndarray = np.clip(np.floor((places - start) * count / length), -1, count).astype(int)
    return cells + 1


def _eroded(mask: np.ndarray) -> np.ndarray:
    """A mask without the pixels at its edge; its border must be empty."""
    tall = mask & np.roll(mask, 1, 0) & np.roll(mask, -1, 0)
    found: np.ndarray = tall & np.roll(tall, 1, 1) & np.roll(tall, -1, 1)
    return found
