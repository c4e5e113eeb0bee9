"""The earlier samples of a session, a part of the tab *Sample*."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ade_base.pictures.read import file_size
from serving.page.files import KEPT_S
from serving.page.inputs import KINDS, MODEL_ID, caption, image_grid, png_text, read

LIMIT = 24  # number of grids that a session remembers


def remember(history: list[Any], grid: str | None) -> Any:
    """Add a grid to the session's grids, without duplicates; the latest comes first."""
    settings = None if grid is None else _settings_of(read(grid))
    if settings is None:
        return gr.skip(), gr.skip()
    history = [(grid, settings), *(entry for entry in history if entry[1] != settings)][:LIMIT]
    history = [entry for entry in history if Path(entry[0]).exists()]
    return history, [
        (path, f"seed {seed}, {n}, {kind}, {temperature:g}, {model}")
        for path, (model, n, seed, temperature, kind) in history
    ]


def _settings_of(grid: bytes) -> tuple[str, int, int, float, str] | None:
    """How a grid was drawn; ``None`` if it was not: any file may be given here."""
    if file_size(grid) is None:
        return None
    with Image.open(io.BytesIO(grid), formats=["PNG"]) as picture:
        text = png_text(picture)
    kind, model = text.get("ade:kind", ""), text.get("ade:model", "")
    if kind not in {value for _, value in KINDS} or not MODEL_ID.fullmatch(model):
        return None
    n, seed, temperature = (text[f"ade:{name}"] for name in ("n", "seed", "temperature"))
    return model.split("@")[0], int(n), int(seed), float(temperature), kind


def again(history: list[Any], event: gr.SelectData) -> Any:
    """The settings of a chosen grid."""
    if event.index >= len(history):  # the page may still show what is no longer kept
        raise gr.Error(
            "These samples are no longer kept: the page keeps them for an hour. Draw their "
            "seed again."
        )
    return history[event.index][1]


def lay_out() -> tuple[gr.State, gr.Gallery]:
    """Lay the part out; returns the grids of the session, and where they are shown."""
    label = "Earlier samples of this session"
    with gr.Accordion(label, open=False):
        caption("Click a set to draw it again.")
        return gr.State([], time_to_live=KEPT_S), image_grid(label, 6, fit_columns=False)
