"""The tab *Sample*: new images, by seed."""

from __future__ import annotations

import secrets
from typing import Any

import gradio as gr

from serving.page.served import KINDS, Served, ask, file, image_output

MAX_GRID = 64


def add_tab(served: Served, model: gr.Dropdown) -> None:
    """Lay the tab out."""
    def sample(model: str, n: float, seed: float, temperature: float, kind: str) -> tuple[str, Any]:
        """A grid of samples as a PNG file."""
        if seed is None:
            raise gr.Error("The seed is empty: it must be a whole number from 0 on.")
        data, used = ask(served.clients[model].sample_png, n=int(n), seed=int(seed), temperature=float(temperature),
                         kind=kind)
        path = file(data, f"samples-{used}-{int(n)}.png")
        return path, gr.DownloadButton(value=path, interactive=True)

    with gr.Row():
        with gr.Column(scale=1):
            n = gr.Slider(1, MAX_GRID, value=16, step=1, label="Images")
            with gr.Row():
                seed = gr.Number(value=7, precision=0, minimum=0, label="Seed", scale=3)
                dice = gr.Button("⚄ New seed", scale=1, min_width=90)
            temperature = gr.Slider(0.1, 1.5, value=1.0, step=0.05, label="Temperature",
                                    info="multiplies the prior's standard deviations")
            kind = gr.Radio(KINDS, value="mean", label="Kind")
            go = gr.Button("Sample", variant="primary")
        with gr.Column(scale=2):
            grid = image_output("Samples", height="min(512px, 92vw)")
            download = gr.DownloadButton("Download PNG (its text holds the seed)", interactive=False)
    inputs = [model, n, seed, temperature, kind]
    go.click(sample, inputs, [grid, download], api_name="sample")
    dice.click(lambda: secrets.randbelow(2**31), None, seed, api_visibility="private").then(
        sample, inputs, [grid, download], api_visibility="private")
