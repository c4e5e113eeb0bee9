"""The tab *Reconstruct*: what a model keeps of an image, level by level."""

from __future__ import annotations

import json
import math
from html import escape

import gradio as gr
import numpy as np

from ade_base.brand import rounded
from ade_base.pictures.show import psnr, tile, write_png
from serving.api.latents import coarsest, from_coarsest
from serving.page.charts import empty, levels_chart
from serving.page.files import write_file
from serving.page.inputs import (
    TabContext,
    as_seen,
    caption,
    examples,
    html,
    image_output,
    image_pair,
    image_strip,
    kind_input,
    live,
    read,
    resize_input,
    slider,
)
from serving.page.models import ask, usable
from serving.page.runs import PRIVATE, run_on_new_image
from serving.page.verdict import notes_of

EMPTY = "The reconstruction appears here: choose an example, or drop an image."
WORDS = {35: "almost indistinguishable", 25: "close: fine detail differs"}  # from which PSNR on


def in_words(decibels: float | None) -> str:
    """Describe a PSNR by the typical error of a pixel value; HTML."""
    if decibels is None:
        return '<div class="ade-part"><p><strong>Equal to the image</strong>.</p></div>'
    error = 255 * 10 ** (-decibels / 20)
    words = next((w for least, w in WORDS.items() if decibels >= least), "coarse: detail is lost")
    return (
        f'<div class="ade-part"><p><strong>PSNR {decibels:.2f} dB</strong>, {words}. A pixel '
        f"value is off by {rounded(error)} of 255, root mean square.</p></div>"
    )


def _enlarged(pixels: np.ndarray, name: str) -> str:
    """Enlarge uint8 ``(H, W, C)`` without smoothing, so that it is sharp under a slider."""
    factor = max(1, 256 // max(pixels.shape[:2]))
    return write_file(write_png(pixels.repeat(factor, axis=0).repeat(factor, axis=1)), name)


class ReconstructTab:
    """The tab."""

    def __init__(self, context: TabContext) -> None:
        self.models, image = context.models, context.inbox.reconstruct
        examples(context, image)
        with gr.Row():
            with gr.Column(scale=2, min_width=280, elem_classes="ade-input"):
                image.render()
                kind = kind_input()
                resize = resize_input()
                levels = self._levels_input(context.model)
                go = gr.Button("Reconstruct", variant="primary")
            with gr.Column(scale=3, min_width=280, elem_classes="ade-outcome"):
                said = live(empty(EMPTY))
                pair = image_pair("Image", "reconstruction")
                caption("Move the slider. Left: what the model sees. Right: its reconstruction.")
                strip = image_strip("From the coarsest level alone to all levels; last, the image")
                with gr.Accordion("Technical details", open=False):
                    difference = image_output("Difference, doubled (equal pixels are grey)")
                    bits = html()
        run_on_new_image(
            context,
            [image],
            self.reconstruct,
            [context.model, image, kind, levels, resize],
            {said: empty(EMPTY), pair: None, strip: None, difference: None, bits: ""},
            said,
            go,
            "reconstruct",
        )

    def reconstruct(
        self, model: str, image: str, kind: str, levels: float, resize: bool
    ) -> tuple[str, tuple[str, str], str, str, str]:
        """Reconstruct an image.

        Returns the quality in words, the image as the model sees it beside its reconstruction, the
        reconstructions from the coarsest levels on, the difference, and the bits by level.
        """
        data, client, bundle = read(image), self.models.clients[model], self.models.bundles[model]
        seen = as_seen(data, bundle, resize).pixels
        eps = ask(client.encode, [data], resize=resize, eps=True).eps
        count = len(bundle.latent_shapes)
        strip = ask(client.sample_with, from_coarsest(eps))
        if levels < count:
            made = ask(client.sample_with, coarsest(eps, int(levels)), kind=kind)[0]
        else:
            made = usable(ask(client.reconstruct, [data], kind=kind, resize=resize)[0]).image
        score = usable(ask(client.score, [data], explain=False, resize=resize)[0])
        said = in_words(psnr(seen, made))
        if notes := "".join(f"<li>{escape(note)}</li>" for note in notes_of(score)):
            said += f'<div class="ade-part"><ul>{notes}</ul></div>'
        difference = np.clip(128 + 2 * (made.astype(int) - seen), 0, 255).astype(np.uint8)
        return (
            said,
            (_enlarged(seen, "input.png"), _enlarged(made, "reconstruction.png")),
            write_file(write_png(tile(np.stack([*strip, seen]), count + 1)), "strip.png"),
            write_file(write_png(difference), "difference.png"),
            levels_chart(score.bpd_parts, bundle.latent_shapes, math.prod(bundle.image_shape)),
        )

    def _levels_input(self, model: gr.Dropdown) -> gr.Slider:
        """The number of levels to keep, of as many as the chosen model has."""
        most = max(2, self.models.most_levels)  # a slider has two ends
        levels = slider(
            1,
            most,
            value=most,
            step=1,
            label="Latent levels kept",
            visible=self.models.most_levels > 1,
            info="Latents describe an image in levels, from coarse to fine. Levels that are "
            "not kept take the values that the coarser ones predict.",
        )
        # When the page is loaded, too: the first model may have fewer levels than another. Before
        # the run that a new model starts, which then has the new number: the browser calls the
        # listeners of an event one after another.
        counts = {name: len(one.latent_shapes) for name, one in self.models.bundles.items()}
        js = f"""(model) => {{
          const count = ({json.dumps(counts)})[model];
          const most = Math.max(2, count);
          return {{ __type__: "update", maximum: most, value: most, visible: count > 1 }};
        }}"""
        gr.on(None, None, model, levels, js=js, **PRIVATE)  # a change of the model, and the load
        return levels
