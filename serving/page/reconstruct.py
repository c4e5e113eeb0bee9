"""The tab *Reconstruct*: what a model keeps of an image, and in which level."""

from __future__ import annotations

import math
from typing import Any

import gradio as gr
import numpy as np

from serving.api.latents import coarsest
from serving.images import psnr, write_png
from serving.page.charts import levels_chart
from serving.page.files import write_file
from serving.page.served import (
    KINDS,
    Shared,
    as_seen,
    ask,
    examples,
    image_output,
    read,
    resize_input,
    usable,
)


def add_tab(shared: Shared) -> None:
    """Lay the tab out."""
    served, model, image = shared.served, shared.model, shared.inbox.reconstruct

    def reconstruct(
        model: str, image: str, kind: str, levels: float, resize: bool
    ) -> tuple[str, str, str, str, str]:
        """The image as the model sees it, its reconstruction and their difference as PNG files, how
        near they are, and the bits by level.
        """
        data, client, bundle = read(image), served.clients[model], served.bundles[model]
        seen = as_seen(data, bundle, resize).pixels
        if levels < len(bundle.latent_shapes):
            eps = ask(client.encode, [data], resize=resize, eps=True).eps
            made = ask(client.sample_with, coarsest(eps, int(levels)), kind=kind)[0]
        else:
            made = usable(ask(client.reconstruct, [data], kind=kind, resize=resize)[0]).image
        score = usable(ask(client.score, [data], explain=False, resize=resize)[0])
        decibels = psnr(seen, made)
        said = [
            "**PSNR "
            + ("infinite: they are equal" if decibels is None else f"{decibels:.2f} dB")
            + "**",
            *(f"- {note}" for note in score.notes),
            "\nBits that it takes, by latent level:",
        ]
        difference = np.clip(128 + 2 * (made.astype(int) - seen), 0, 255).astype(np.uint8)
        return (
            write_file(write_png(seen), "input.png"),
            write_file(write_png(made), "reconstruction.png"),
            write_file(write_png(difference), "difference.png"),
            "\n".join(said),
            levels_chart(score.bpd_parts, bundle.latent_shapes, math.prod(bundle.image_shape)),
        )

    def all_levels(name: str) -> Any:
        count = len(served.bundles[name].latent_shapes)
        return gr.Slider(maximum=max(2, count), value=max(2, count), visible=count > 1)

    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            image.render()
            kind = gr.Radio(KINDS, value="mean", label="Kind")
            most = max(2, served.most_levels)  # a slider has two ends
            levels = gr.Slider(
                1,
                most,
                value=most,
                step=1,
                label="Latent levels kept",
                visible=served.most_levels > 1,
                info="of the finer ones, what the coarser lead to expect",
            )
            resize = resize_input(served)
            go = gr.Button("Reconstruct", variant="primary")
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                shown = [
                    image_output(name, min_width=150)
                    for name in ("Input", "Reconstruction", "Difference, doubled around grey")
                ]
            said = gr.Markdown()
            bits = gr.HTML()
    examples(image, served)
    go.click(
        reconstruct,
        [model, image, kind, levels, resize],
        [*shown, said, bits],
        api_name="reconstruct",
    )
    model.change(all_levels, model, levels, api_visibility="private")
