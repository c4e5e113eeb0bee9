"""The tab *Score*: how likely an image is, and whether it looks like the training images."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from serving.charts import explain_table, histogram_chart, parts_chart
from serving.client import ScoreResult
from serving.page.served import Served, ask, examples, file, image_input, image_output, read, usable

REASONS = 6  # statistics that are shown of an image


def add_tab(served: Served, model: gr.Dropdown) -> None:
    """Lay the tab out."""
    def score(model: str, image: str, samples: float, alpha: float, resize: bool) -> tuple[str, str, str, str | None, str]:
        """The verdict in words, the parts, the place in the reference histogram, the heat map and the reasons."""
        read(image)
        (result,) = ask(served.clients[model].score, [Path(image).read_bytes()], samples=int(samples), alpha=alpha,
                        resize=resize, map=True)
        usable(result)
        calibration = served.calibrations.get(model)
        place = histogram_chart(calibration.bpd, result.bpd) if calibration else ""
        heat = result.heat_map and file(result.heat_map, "map.png")
        why = explain_table(result.explain[:REASONS]) if result.explain else ""
        return verdict_text(result, alpha), parts_chart(result.bpd_parts, result.bpd), place, heat or None, why

    with gr.Row():
        with gr.Column(scale=1):
            image = image_input()
            samples = gr.Slider(1, 64, value=1, step=1, label="Draws (K)", info="1 is the ELBO; more tighten the bound")
            alpha = gr.Slider(0.001, 0.2, value=0.01, step=0.001, label="False-alarm rate (alpha)")
            resize = gr.Checkbox(False, label="Resize other sizes to fit")
            go = gr.Button("Score", variant="primary")
        with gr.Column(scale=2):
            verdict = gr.Markdown(elem_classes="ade-verdict")
            parts = gr.HTML(label="Parts, bits per dimension")
            place = gr.HTML(label="Place among the calibration images")
            with gr.Row():
                with gr.Column(min_width=280):
                    heat = image_output("Where the bits lie: bright is dear")
                with gr.Column(min_width=280):
                    why = gr.HTML(label="The most unusual statistics")
    examples(image)
    go.click(score, [model, image, samples, alpha, resize], [verdict, parts, place, heat, why], api_name="score")


def verdict_text(result: ScoreResult, alpha: float) -> str:
    """A sentence, and the notes."""
    error = f" ± {result.standard_error:.3f}" if result.standard_error is not None else ""
    head = f"{result.bpd:.3f}{error} bits per dimension. "
    if result.p_value is None:
        verdict = "No verdict."
    elif result.ood:
        verdict = f"Unlike the training images (p = {result.p_value:.4f} ≤ {alpha:g})."
    else:
        verdict = f"Not unusual (p = {result.p_value:.3f})."
    return head + verdict + "".join(f"\n- {note}" for note in result.notes)
