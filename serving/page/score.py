"""The tab *Score*: how likely an image is, and whether it looks like the training images."""

from __future__ import annotations

import io

import gradio as gr
import numpy as np
from PIL import Image

from serving.client import ScoreResult
from serving.images import write_png
from serving.page.charts import explain_table, histogram_chart, parts_chart
from serving.page.files import KEPT_S, write_file
from serving.page.served import Shared, as_seen, ask, examples, read, resize_input, usable
from serving.verdict.calibration import Calibrations
from serving.verdict.decision import decide

PLACE = (
    "<p class='ade-caption'>Bits per dimension among those of the calibration images. The verdict is made of dozens "
    "of statistics, of which the bits are but some: an image may be unusual in the middle of this hill.</p>"
)
REASONS = 6  # statistics that are shown of an image


def over(pixels: np.ndarray, heat: bytes) -> tuple[str, str]:
    """The image at the size of its heat map, and the heat map; both PNG files."""
    with Image.open(io.BytesIO(heat)) as picture:
        size = picture.size
    own = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    shown = own.convert("RGB").resize(size, Image.Resampling.NEAREST)
    return write_file(write_png(np.asarray(shown)), "image.png"), write_file(heat, "map.png")


def add_tab(shared: Shared) -> None:
    """Lay the tab out."""
    served, image = shared.served, shared.inbox.score

    def score(
        model: str, image: str, samples: float, alpha: float, resize: bool
    ) -> tuple[str, str, str, tuple[str, str] | None, str, tuple[ScoreResult, bool]]:
        """The verdict in words, the parts, the place in the reference histogram, the heat map and
        the reasons.
        """
        data = read(image)
        (result,) = ask(
            served.clients[model].score,
            [data],
            samples=int(samples),
            alpha=alpha,
            resize=resize,
            map=True,
        )
        usable(result)
        seen = as_seen(data, served.bundles[model], resize)
        calibration = served.calibrations[model].of(seen.resized)
        place = "" if calibration is None else PLACE + histogram_chart(calibration.bpd, result.bpd)
        heat = over(seen.pixels, result.heat_map) if result.heat_map else None
        why = explain_table(result.explain[:REASONS]) if result.explain else ""
        text = verdict_text(result, alpha, served.calibrations[model], seen.resized)
        return (
            text,
            parts_chart(result.bpd_parts, result.bpd),
            place,
            heat,
            why,
            (result, seen.resized),
        )

    def judge(model: str, scored: tuple[ScoreResult, bool] | None, alpha: float) -> str:
        """The verdict at another alpha: the p-value stays."""
        if scored is None:
            return ""
        result, resized = scored
        return verdict_text(result, alpha, served.calibrations[model], resized)

    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            image.render()
            samples = gr.Slider(
                1,
                64,
                value=1,
                step=1,
                label="Draws (K)",
                info="1 is the ELBO; more tighten the bound",
            )
            alpha = gr.Slider(0.001, 0.2, value=0.01, step=0.001, label="False-alarm rate (alpha)")
            resize = resize_input(served)
            go = gr.Button("Score", variant="primary")
        with gr.Column(scale=2, min_width=300):
            verdict = gr.Markdown(elem_classes="ade-verdict")
            parts = gr.HTML(label="Parts, bits per dimension")
            place = gr.HTML(label="Place among the calibration images")
            with gr.Row():
                with gr.Column(min_width=280):
                    heat = gr.ImageSlider(
                        label="Where the bits lie: bright costs many",
                        type="filepath",
                        format="png",
                        interactive=False,
                        height=280,
                        elem_classes="ade-pixels",
                        buttons=["fullscreen"],
                    )
                with gr.Column(min_width=280):
                    why = gr.HTML(label="The most unusual statistics")
    scored = gr.State(time_to_live=KEPT_S)
    examples(image, served)
    go.click(
        score,
        [shared.model, image, samples, alpha, resize],
        [verdict, parts, place, heat, why, scored],
        api_name="score",
    )
    alpha.change(
        judge,
        [shared.model, scored, alpha],
        verdict,
        show_progress="hidden",
        api_visibility="private",
    )


def verdict_word(result: ScoreResult) -> str:
    return {"accept": "usual", "reject": "unlike the training images"}.get(
        result.decision, "no verdict"
    )


def verdict_text(
    result: ScoreResult, alpha: float, calibrations: Calibrations, resized: bool
) -> str:
    """A sentence, and the notes."""
    error = f" ± {result.standard_error:.3f}" if result.standard_error is not None else ""
    head = f"{result.bpd:.3f}{error} bits per dimension. "
    notes = [
        note for note in result.notes if not note.startswith("nothing can be flagged")
    ]  # at the alpha of the request
    decision = decide(result.p_value, calibrations, resized, alpha)
    if result.p_value is None:
        verdict = "No verdict."
    elif decision.reason is not None:
        verdict = f"No verdict at this alpha (p = {result.p_value:.3f})."
        notes = [*notes, decision.reason.partition(": ")[2]]
    elif decision.choice == "reject":
        verdict = f"Unlike the training images (p = {result.p_value:.4f} ≤ {alpha:g})."
    else:
        verdict = f"Not unusual (p = {result.p_value:.3f})."
    return head + verdict + "".join(f"\n- {note}" for note in notes)
