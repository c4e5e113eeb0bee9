"""Where a picture is unusual: the p-values of its parts, and their place."""

from __future__ import annotations

import numpy as np

from ade_base.pictures.view import STRIDE, View
from ade_client.contract import Regions
from ade_client.outlines import outlined

DIGITS = 4  # after the point, of a p-value; rounded up, so that a mark at alpha has at most alpha
SLACK = 1e-3  # of the last digit: a p-value of 0.05 is a bit more in float32
CELL_BYTES = 8  # of a p-value in JSON


def regions_of(p_values: np.ndarray, view: View) -> Regions:
    """The p-values of a picture's parts, and their place in the original.

    Args:
        p_values: of all patches of the view, ``(P,)``.
        view: the picture as the encoder saw it.
    """
    inside = view.inside
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    cells = p_values.reshape(inside.shape)[np.ix_(rows, columns)].astype(np.float64)
    top, left, height, width = view.box
    down, across = view.original[0] / height, view.original[1] / width
    return Regions(
        p_values=np.round(np.ceil(cells * 10**DIGITS - SLACK) / 10**DIGITS, DIGITS),
        left=round(float(columns[0] * STRIDE - left) * across, 2),
        top=round(float(rows[0] * STRIDE - top) * down, 2),
        width=round(len(columns) * STRIDE * across, 2),
        height=round(len(rows) * STRIDE * down, 2),
        image_width=view.original[1],
        image_height=view.original[0],
    )


def outlined_view(view: View, regions: Regions, alpha: float) -> np.ndarray:
    """The picture as the encoder saw it, with outlines around its unusual parts.

    Args:
        view: of the picture.
        regions: of it.
        alpha: parts of at most this p-value are outlined.
    """
    top, left, height, width = view.box
    return outlined(view.pixels[top : top + height, left : left + width], regions, alpha)
