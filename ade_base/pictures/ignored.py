"""Regions of pictures that nothing looks at, such as a clock in a corner or a part of the machine.

They are the white pixels of a mask that has the pictures' size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from ade_base.errors import UserError
from ade_base.pictures.limits import ImageError, Structure
from ade_base.pictures.read import MAX_PIXELS, MAX_SCALED_PIXELS, read_image

WHITE = 128  # grey levels from which on a pixel of a mask is white
BITS, SIZES = "ignored", "ignored_sizes"  # names of arrays


class MaskError(UserError, ValueError):
    """A mask that cannot be used."""


@dataclass(frozen=True, eq=False)
class Ignored:
    """The pixels that are filled before anything looks at a picture.

    Attributes:
        bits: uint8 ``(h, ceil(w / 8))``, the mask, eight pixels per byte; 1 is ignored.
        width: of the mask, ``w``.
        size: width and height of the pictures. The mask may be reduced as large images are.
    """

    bits: np.ndarray
    width: int
    size: tuple[int, int]

    @classmethod
    def read(cls, data: bytes) -> Ignored:
        """Of an image file; its white pixels are ignored.

        Raises:
            MaskError: it is not an image, too large, or has no white pixel or nothing else.
        """
        try:
            decoded = read_image(data)
        except ImageError as error:
            raise MaskError(f"the mask of ignored regions: {error}") from error
        white = np.asarray(Image.fromarray(decoded.pixels).convert("L")) >= WHITE
        made = cls(np.packbits(white, axis=1), white.shape[1], decoded.size)
        problem = made.problem()
        if problem is not None:
            raise MaskError(f"the mask of ignored regions: {problem}")
        return made

    @property
    def share(self) -> float:
        """The share of a picture that is ignored."""
        return float(self._mask.mean())

    def refuses(self, size: tuple[int, int]) -> str | None:
        """Why a picture of this width and height cannot be used; ``None`` if it can."""
        if size == self.size:
            return None
        return (
            f"images must be {self.size[0]} x {self.size[1]} pixels, as the mask of the regions "
            f"that this calibration ignores, got {size[0]} x {size[1]}"
        )

    def at(self, height: int, width: int) -> np.ndarray:
        """The pixels of a reduced picture that show something ignored, bool ``(height, width)``."""
        if (height, width) not in self._scaled:
            mask = Image.fromarray(self._mask * np.uint8(255))
            made = np.asarray(mask.resize((width, height), Image.Resampling.BOX)) > 0
            self._scaled[height, width] = made
        return self._scaled[height, width]

    def fill(self, pixels: np.ndarray) -> np.ndarray:
        """A copy of a picture, uint8 ``(H, W, C)``, whose ignored pixels have the others' mean."""
        mask = self.at(*pixels.shape[:2])
        filled = pixels.copy()
        # One channel at a time, which is ten times as fast.
        filled[mask] = [np.rint(its[~mask].mean()) for its in pixels.transpose(2, 0, 1)]
        return filled

    def problem(self) -> str | None:
        """Why it cannot be used; ``None`` if it can."""
        columns, rows = self.size
        if min(self.size) < 1 or columns * rows > MAX_SCALED_PIXELS:
            return f"its pictures may have at most {MAX_SCALED_PIXELS} pixels"
        scale = Structure("JPEG", columns, rows).scale  # of the most reduced picture
        shapes = [(-(-rows // its), -(-columns // its)) for its in (1, scale)]
        shape = len(self.bits), self.width
        if self.bits.dtype != np.uint8 or self.bits.shape != (shape[0], -(-self.width // 8)):
            return f"{BITS} must be uint8, eight pixels per byte"
        if shape not in shapes or shape[0] * shape[1] > MAX_PIXELS:
            return f"{BITS} must have one of the shapes {shapes}, got {shape}"
        if not self._mask.any():
            return "no pixel is white, so nothing would be ignored"
        if self.at(*shapes[1]).all():
            return "white pixels cover the whole picture"
        return None

    @cached_property
    def _mask(self) -> np.ndarray:
        return np.unpackbits(self.bits, axis=1, count=self.width)

    @cached_property
    def _scaled(self) -> dict[tuple[int, int], np.ndarray]:
        """By shape: pictures of one size are decoded at few, and seen at few."""
        return {}

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        return {BITS: self.bits, SIZES: np.array([self.width, *self.size])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> Ignored | None:
        """Rebuild from :meth:`arrays`, with names after a prefix; ``None`` without such arrays."""
        if prefix + BITS not in arrays:
            return None
        width, *size = (int(its) for its in arrays[prefix + SIZES])
        return cls(arrays[prefix + BITS], width, (size[0], size[1]))
