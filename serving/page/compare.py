"""The tab *Compare*: one image under every model that is served."""

from __future__ import annotations

import base64
from html import escape

import gradio as gr
import numpy as np

from serving.brand import verdict_card
from serving.client import AdeError
from serving.images import write_png
from serving.page import charts
from serving.page.score import alpha_input, verdict
from serving.page.served import (
    RESIZE,
    Served,
    Shared,
    as_seen,
    ask,
    examples,
    html,
    read,
    run_on_new_image,
    sentence,
)

EMPTY = "One verdict per model appears here: choose an example, or drop an image."


def add_tab(shared: Shared) -> None:
    """Lay the tab out."""
    served, image = shared.served, shared.inbox.compare

    def compare(image: str, alpha: float, resize: bool) -> str:
        """One card per model: its verdict, the likelihood, and the reconstruction; HTML."""
        data = read(image)
        return "".join(_card(served, name, data, alpha, resize) for name in served.bundles)

    examples(image, shared.examples)
    with gr.Row():
        with gr.Column(scale=2, min_width=280, elem_classes="ade-input"):
            image.render()
            alpha = alpha_input()
            resize = gr.Checkbox(True, label=RESIZE)
            go = gr.Button("Compare", variant="primary")
        with gr.Column(scale=3, min_width=280, elem_classes="ade-outcome"):
            cards = html(charts.empty(EMPTY))
            gr.Markdown(
                "Bits per dimension of models of different sizes describe different images: "
                "compare the verdicts there.",
                elem_classes="ade-caption",
            )
    run_on_new_image(
        [image],
        shared.model,
        compare,
        [image, alpha, resize],
        {cards: charts.empty(EMPTY)},
        go,
        "compare",
    )


def _card(served: Served, model: str, data: bytes, alpha: float, resize: bool) -> str:
    """The card of one model; a missing operation becomes a note."""
    bundle, client = served.bundles[model], served.clients[model]
    height, width, _ = bundle.image_shape
    head = f"{model}, {width} × {height} pixels"
    try:
        seen = as_seen(data, bundle, resize)
        score = ask(client.score, [data], alpha=alpha, explain=False, resize=resize)[0]
        made = ask(client.reconstruct, [data], resize=resize)[0]
        for result in (score, made):
            if isinstance(result, AdeError):
                raise gr.Error(sentence(result))
    except gr.Error as error:
        card = verdict_card("no_verdict", str(error.message))
        return f'<section class="ade-part ade-model"><h3>{escape(head)}</h3>{card}</section>'
    choice, why = verdict(served, model, (score, seen.resized), alpha)
    facts = [f"{score.bpd:.3f} bits per dimension", f"PSNR {made.psnr:.2f} dB"]
    if score.p_value is not None:
        facts.insert(0, f"p = {score.p_value:.2g}")
    card = verdict_card(choice, why, facts, score.notes)
    return (
        f'<section class="ade-part ade-model"><h3>{escape(head)}</h3><div class="ade-beside">'
        f"{_picture(made.image, f'Reconstruction by {model}')}<div>{card}</div></div></section>"
    )


def _picture(pixels: np.ndarray, text: str) -> str:
    source = base64.b64encode(write_png(pixels)).decode()
    return f'<img src="data:image/png;base64,{source}" alt="{escape(text)}">'
