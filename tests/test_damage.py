"""Small local damage, by which the report says what a gate sees."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ade_base.pictures.ignored import Ignored
from ade_base.pictures.view import LARGE, SMALL, Look
from ade_cli.calibrate import _tell_caught
from export.gate.damage import DAMAGES, damaged
from serving.ingest.picture import Picture, prepare_image


def pictures(images, look):
    made = [prepare_image(image, (32, 32, 3), True, lambda resized: look) for image in images]
    return [its for its in made if isinstance(its, Picture)]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_small_part_of_each_picture_is_damaged(kind, real_images):
    """The view and the pixels at the same place: not where nothing looks."""
    mask = io.BytesIO()
    Image.fromarray(np.repeat(np.uint8([255, 0]), 16)[:, None].repeat(32, 1)).save(mask, "PNG")
    look = Look(LARGE, Ignored.read(mask.getvalue()))
    given = pictures(real_images[:30], look)
    made = dict(damaged(given, look.ignored))[kind]
    shares = []
    for before, after in zip(given, made, strict=True):
        assert before.view is not None and after.view is not None
        seen = (before.view.pixels != after.view.pixels).any(2)
        # Of which the filter also takes pixels beside the part, as of a real one.
        small = (np.abs(before.pixels.astype(int) - after.pixels) > 4).any(2)
        assert not seen[:112].any() and not small[:14].any()
        shares.append(seen[112:].mean())
        if small.any():
            centre = np.argwhere(seen).mean(0) / 7 - np.argwhere(small).mean(0)
            assert np.abs(centre).max() < 2
    assert 0.001 < np.mean(shares) < 0.1 and np.mean(np.array(shares) > 0) > 0.9


def test_pictures_whose_parts_no_encoder_sees(real_images):
    for size in (0, SMALL):
        assert not [*damaged(pictures(real_images[:3], Look(size)))]


def test_the_report_says_what_is_not_seen(capsys):
    shares = {0.05: {"a stain": 0.6, "constant": 1.0}, 0.01: {"a stain": 0.4, "constant": 1.0}}

    class Made:
        corrupted, scores, sees_content = {"a stain": [0], "constant": [0]}, [0.0] * 600, True
        caught = staticmethod(shares.__getitem__)

    made: Any = Made()
    _tell_caught(made)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:3] == [
        "  a stain: 60 % at alpha 0.05, 40 % at alpha 0.01",
        "  constant: 100 % at alpha 0.05, 100 % at alpha 0.01",
    ]
    assert lines[3].startswith("not seen: at alpha 0.01") and lines[3].endswith(": a stain")
