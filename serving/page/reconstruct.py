"""The tab *Reconstruct*: what a model keeps of an image."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import numpy as np

from serving.images import write_png
from serving.page.served import KINDS, Served, ask, examples, file, image_input, image_output, read, usable


def add_tab(served: Served, model: gr.Dropdown) -> None:
    """Lay the tab out."""
    def reconstruct(model: str, image: str, kind: str, resize: bool) -> tuple[str, str, str | None, str]:
        """The image as the model sees it, its reconstruction and their difference, as PNG files."""
        original = read(image)
        (result,) = ask(served.clients[model].reconstruct, [Path(image).read_bytes()], kind=kind, resize=resize)
        made = usable(result).image
        said = f"**PSNR {result.psnr:.2f} dB**" + "".join(f"\n- {note}" for note in result.notes)
        shown = file(write_png(original), "input.png"), file(write_png(made), "reconstruction.png")
        if original.shape != made.shape:
            return *shown, None, said
        difference = np.clip(128 + 2 * (made.astype(int) - original), 0, 255).astype(np.uint8)
        return *shown, file(write_png(difference), "difference.png"), said

    with gr.Row():
        with gr.Column(scale=1):
            image = image_input()
            kind = gr.Radio(KINDS, value="mean", label="Kind")
            resize = gr.Checkbox(False, label="Resize other sizes to fit")
            go = gr.Button("Reconstruct", variant="primary")
        with gr.Column(scale=2):
            with gr.Row():
                shown = [image_output(name) for name in ("Input", "Reconstruction", "Difference × 2")]
            said = gr.Markdown()
    examples(image)
    go.click(reconstruct, [model, image, kind, resize], [*shown, said], api_name="reconstruct")
