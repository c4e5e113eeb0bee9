"""The tab *Compare*: one image under every model that is served."""

from __future__ import annotations

from typing import Any

import gradio as gr

from serving.client import AdeClient, AdeError
from serving.images import write_png
from serving.page.files import write_file
from serving.page.score import verdict_word
from serving.page.served import Shared, ask, examples, read, sentence

COLUMNS = ["model", "bpd", "p-value", "verdict", "PSNR, dB", "notes"]
NONE = "–"


def add_tab(shared: Shared) -> None:
    """Lay the tab out."""
    clients, image = shared.served.clients, shared.inbox.compare

    def compare(
        image: str, alpha: float, resize: bool
    ) -> tuple[list[list[Any]], list[tuple[str, str]]]:
        """A row a model: how likely the image is and what the model says of it; and its
        reconstructions.
        """
        data = read(image)
        rows, pictures = [], []
        for name, client in clients.items():
            row, made = _row(client, data, alpha, resize)
            rows.append([name, *row])
            if made is not None:
                pictures.append((write_file(write_png(made), f"{name}.png"), name))
        return rows, pictures

    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            image.render()
            alpha = gr.Slider(0.001, 0.2, value=0.01, step=0.001, label="False-alarm rate (alpha)")
            resize = gr.Checkbox(True, label="Resize other sizes to fit")
            go = gr.Button("Compare", variant="primary")
        with gr.Column(scale=2, min_width=300):
            table = gr.Dataframe(
                headers=COLUMNS,
                interactive=False,
                wrap=True,
                column_widths=[150, 80, 90, 190, 90, 260],
                label="Bits of models of different sizes are of different things: compare verdicts there",
            )
            made = gr.Gallery(
                label="Reconstructions",
                type="filepath",
                format="png",
                interactive=False,
                columns=3,
                fit_columns=False,
                allow_preview=False,
                elem_classes="ade-pixels ade-grid",
                buttons=[],
            )
    examples(image, shared.served)
    go.click(compare, [image, alpha, resize], [table, made], api_name="compare")


def _row(client: AdeClient, data: bytes, alpha: float, resize: bool) -> tuple[list[Any], Any]:
    """Of one model: the table's row without its name, and the reconstruction; what it cannot do is
    a note.
    """
    try:
        score = ask(client.score, [data], alpha=alpha, explain=False, resize=resize)[0]
        made = ask(client.reconstruct, [data], resize=resize)[0]
    except gr.Error as error:
        return [NONE, NONE, NONE, NONE, str(error.message)], None
    for result in (score, made):
        if isinstance(result, AdeError):
            return [NONE, NONE, NONE, NONE, sentence(result)], None
    p_value = NONE if score.p_value is None else f"{score.p_value:.4f}"
    return [
        f"{score.bpd:.3f}",
        p_value,
        verdict_word(score),
        f"{made.psnr:.2f}",
        "; ".join(score.notes),
    ], made.image
