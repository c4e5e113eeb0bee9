"""A few of the images that calibrate a gate, small, which the page shows if their owner agrees."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import read_image
from export.gate.images import Images
from serving.engine.bundle import EXAMPLE_NAME
from serving.ingest.picture import Picture

COUNT = 6  # a row of the page, also on a phone
CANDIDATES = 2 * COUNT  # some may not be readable
SCALE = 4  # an example has at most this many times the model's height and width


class Examples:
    """Chooses images at random, the same each time, among those that pass.

    Args:
        image_shape: ``(H, W, C)`` of the model.
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        height, width, _ = image_shape
        self.size = SCALE * width, SCALE * height
        self._chosen: list[bytes | np.ndarray | Picture] = []

    def passing(self, images: Images) -> Iterator[bytes | np.ndarray | Picture]:
        """Yield the same images, each of which is chosen with the same probability."""
        choice = random.Random(0)
        for count, image in enumerate(images, 1):
            place = choice.randrange(count)
            if len(self._chosen) < CANDIDATES:
                self._chosen.append(image)
            elif place < CANDIDATES:
                self._chosen[place] = image
            yield image

    def write(self, folder: Path) -> int:
        """Write them into a bundle that is being made; returns their number."""
        count = 0
        for picture in islice(self._pictures(), COUNT):
            count += 1
            picture.thumbnail(self.size)
            picture.save(folder / EXAMPLE_NAME.format(count))
        return count

    def _pictures(self) -> Iterator[Image.Image]:
        for image in self._chosen:
            try:
                pixels = read_image(image).pixels if isinstance(image, bytes) else image
            except (ImageError, MemoryError):
                continue
            pixels = pixels.pixels if isinstance(pixels, Picture) else pixels
            yield Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
