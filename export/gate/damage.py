"""Damages small parts of pictures, to measure whether the verdict detects it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ade_base.pictures.ignored import Ignored
from ade_base.pictures.show import resize_centre
from ade_base.pictures.view import LARGE, View
from serving.ingest.picture import Picture

SCRATCH, STAIN, MISSING, PASTED = DAMAGES = (
    "a scratch",
    "a stain",
    "a missing part",
    "a part from another place",
)
LENGTH, WIDTH = 0.3, 0.012  # of a scratch, in shorter sides of the picture
RADIUS, SIDE = 0.08, 0.15  # of a stain, and of a part


def damaged(
    images: Sequence[Picture], ignored: Ignored | None = None
) -> Iterator[tuple[str, list[Picture]]]:
    """The pictures damaged in each way, after its name; none unless an encoder sees their parts.

    The view and the pixels are damaged at the same place of the picture, which is not ignored.
    """
    seen = [its for its in images if its.view is not None and len(its.view.pixels) >= LARGE]
    for kind in DAMAGES if seen else ():
        yield (
            kind,
            [
                _damaged(image, image.view, kind, ignored, np.random.default_rng(row))
                for row, image in enumerate(seen)
                if image.view is not None
            ],
        )


def _damaged(
    image: Picture, view: View, kind: str, ignored: Ignored | None, rng: np.random.Generator
) -> Picture:
    top, left, height, width = view.box
    free = np.ones((height, width), bool) if ignored is None else ~ignored.at(height, width)
    place = rng.permutation(np.argwhere(free) if free.any() else [[0, 0]])[0]
    cover = np.where(free, _cover(kind, place, free.shape, rng), np.uint8(0))[:, :, None]
    shift = rng.uniform(0.25, 0.75, 2) * free.shape
    pixels = view.pixels.copy()
    box = pixels[top : top + height, left : left + width]
    box[:] = _covered(box, cover, kind, shift)
    rows, columns = image.pixels.shape[:2]
    scale = min(height / rows, width / columns)
    small = _covered(image.pixels, resize_centre(cover, rows, columns), kind, shift / scale)
    return dataclasses.replace(image, pixels=small, view=dataclasses.replace(view, pixels=pixels))


def _cover(
    kind: str, place: np.ndarray, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """How far each pixel is damaged, uint8 of that shape."""
    side, (y, x) = min(shape), place.tolist()
    made = Image.new("L", shape[::-1])
    draw = ImageDraw.Draw(made)
    if kind == SCRATCH:
        angle = rng.uniform(0, np.pi)
        down, across = (LENGTH * side / 2 * its for its in (np.sin(angle), np.cos(angle)))
        ends = [x - across, y - down, x + across, y + down]
        draw.line(ends, fill=200, width=max(1, round(WIDTH * side)))
    elif kind == STAIN:
        draw.ellipse(
            [x - RADIUS * side, y - RADIUS * side, x + RADIUS * side, y + RADIUS * side], 255
        )
        made = made.filter(ImageFilter.GaussianBlur(RADIUS * side / 4))
    else:
        half = SIDE * side / 2
        draw.rectangle([x - half, y - half, x + half, y + half], 255)
    return np.asarray(made)


def _covered(pixels: np.ndarray, cover: np.ndarray, kind: str, shift: np.ndarray) -> np.ndarray:
    """Pixels with other ones in place of the covered ones, uint8."""
    mean = pixels.mean((0, 1))
    other = {
        SCRATCH: 255.0 if mean.mean() < 128 else 0.0,
        STAIN: 0.6 * pixels,
        MISSING: mean,
        PASTED: np.roll(pixels, np.rint(shift).astype(int), (0, 1)),
    }[kind]
    return np.asarray(np.rint(pixels + cover / 255 * (other - pixels)), np.uint8)
