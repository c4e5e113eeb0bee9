"""Draws out-of-distribution examples of several sizes, which are not photographs."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LINES = ("Invoice 2043", "Paper, A4      12.50", "Pencils         3.90", "Total EUR      16.40")


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8))


def _text() -> Image.Image:
    picture = Image.new("RGB", (320, 200), "#fdfdfb")
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(LINES):
        draw.text((22, 22 + 40 * i), line, "#222222", ImageFont.load_default(26 if i else 32))
    return picture


def _chart() -> Image.Image:
    picture = Image.new("RGB", (400, 300), "white")
    draw = ImageDraw.Draw(picture)
    for i, size in enumerate((90, 150, 120, 200, 235, 175)):
        draw.rectangle((40 + 56 * i, 260 - size, 80 + 56 * i, 260), "#3566b0")
    draw.line((30, 20, 30, 260, 380, 260), "#222222", 4)
    return picture


def _stripes() -> Image.Image:
    y, x = np.mgrid[0:128, 0:128]
    wave = 127.5 + 127.5 * np.sin((x + 2 * y) / 5.0)
    return Image.fromarray(np.stack([wave, 255 - wave, wave], axis=2).astype(np.uint8))


def _house() -> Image.Image:
    picture = Image.new("RGB", (360, 240), "#bfe0ff")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 170, 360, 240), "#6fbf5a")
    draw.ellipse((280, 20, 330, 70), "#ffd23f")
    draw.rectangle((90, 100, 220, 200), "#e8b58a", "#5a3a22", 4)
    draw.polygon(((75, 104), (155, 40), (235, 104)), "#b5423a", "#5a3a22")
    draw.rectangle((140, 145, 172, 200), "#5a3a22")
    return picture


def _blobs() -> Image.Image:
    y, x = np.mgrid[0:64, 0:64] / 64
    waves = [np.sin(9 * x + 4 * np.cos(7 * y + shift)) for shift in (0, 2, 4)]
    return Image.fromarray((127.5 + 127.5 * np.stack(waves, axis=2)).astype(np.uint8))


DRAWINGS = {
    "drawing": _house,
    "text": _text,
    "chart": _chart,
    "stripes": _stripes,
    "colours": _blobs,
    "noise": _noise,
}


def draw(name: str) -> bytes:
    """A picture of :data:`DRAWINGS` as a PNG file; always the same."""
    out = io.BytesIO()
    DRAWINGS[name]().save(out, "PNG")
    return out.getvalue()
