"""The tab *Compare*: one image under every model that is served."""

from __future__ import annotations

import base64
import math
from html import escape

import gradio as gr
import numpy as np

from ade_base.brand import verdict_card
from ade_base.pictures.show import write_png
from serving.page import charts
from serving.page.inputs import (
    TabContext,
    as_seen,
    caption,
    examples,
    live,
    read,
    resize_input,
)
from serving.page.models import Models, ask, usable
from serving.page.runs import run_on_new_image
from serving.page.verdict import Scored, alpha_input, facts_of, notes_of, verdict

EMPTY = "One verdict per model appears here: choose an example, or drop an image."


class CompareTab:
    """The tab."""

    def __init__(self, context: TabContext) -> None:
        self.models, image = context.models, context.inbox.compare
        examples(context, image)
        with gr.Row():
            with gr.Column(scale=2, min_width=280, elem_classes="ade-input"):
                image.render()
                alpha = alpha_input("Compare")
                resize = resize_input()
                go = gr.Button("Compare", variant="primary")
            with gr.Column(scale=3, min_width=280, elem_classes="ade-outcome"):
                cards = live(charts.empty(EMPTY))
                caption(
                    "All served models judge the image; the choice of model above has no effect "
                    "here. Models that take other sizes see other pixels: compare their verdicts, "
                    "not their bits per dimension."
                )
        blank, given = {cards: charts.empty(EMPTY)}, [image, alpha, resize]
        run_on_new_image(context, [image], self.compare, given, blank, cards, go, "compare")

    def compare(self, image: str, alpha: float, resize: bool) -> str:
        """One card per model: its verdict, the likelihood, and the reconstruction; HTML."""
        data = read(image)
        cards = {name: card(self.models, name, data, alpha, resize) for name in self.models.bundles}
        failed = {card for card in cards.values() if isinstance(card, gr.Error)}
        if len(failed) == len(cards) and len({str(error.message) for error in failed}) == 1:
            raise next(iter(failed))  # no model can use the image: one message
        return "".join(_section(self.models, name, card) for name, card in cards.items())


def card(models: Models, model: str, data: bytes, alpha: float, resize: bool) -> str | gr.Error:
    """The reconstruction and the verdict of one model, HTML; or why there are none."""
    bundle, client = models.bundles[model], models.clients[model]
    try:
        seen = as_seen(data, bundle, resize)
        score = usable(ask(client.score, [data], alpha=alpha, explain=False, resize=resize)[0])
        made = usable(ask(client.reconstruct, [data], resize=resize)[0])
    except gr.Error as error:
        return error
    choice, why = verdict(models.calibrations_of(model), Scored(score, seen.resized), alpha)
    likeness = "exact reconstruction" if math.isinf(made.psnr) else f"PSNR {made.psnr:.2f} dB"
    shown = verdict_card(choice, why, [*facts_of(score), likeness], notes_of(score))
    picture = _picture(made.image, f"Reconstruction by {model}")
    return f'<div class="ade-beside">{picture}<div>{shown}</div></div>'


def _section(models: Models, model: str, card: str | gr.Error) -> str:
    """The card of one model, or its error, under the model's name."""
    height, width, _ = models.bundles[model].image_shape
    head = escape(f"{model}, {width} × {height} pixels")
    shown = card if isinstance(card, str) else verdict_card("no_verdict", str(card.message))
    return f'<section class="ade-part ade-model"><h3>{head}</h3>{shown}</section>'


def _picture(pixels: np.ndarray, text: str) -> str:
    source = base64.b64encode(write_png(pixels)).decode()
    return f'<img src="data:image/png;base64,{source}" alt="{escape(text)}">'
