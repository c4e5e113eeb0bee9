"""The tab *Score*: how likely an image is, and whether it looks like the known images."""

from __future__ import annotations

import dataclasses
import io
from typing import Any, TypeGuard

import gradio as gr
import numpy as np
from PIL import Image

from ade_base.brand import percent
from ade_base.pictures.read import read_image
from ade_base.pictures.show import write_png
from ade_client.outlines import outlined
from serving.page import charts
from serving.page.files import read_file, write_file
from serving.page.inputs import (
    TabContext,
    as_seen,
    examples,
    html,
    image_output,
    image_pair,
    image_strip,
    live,
    read,
    resize_input,
    slider,
)
from serving.page.models import ask, usable
from serving.page.runs import PRIVATE, Runs, run_on_new_image
from serving.page.verdict import (
    ALPHA,
    MAX_ALPHA,
    MIN_ALPHA,
    Scored,
    alpha_input,
    explained,
    judge_of,
)

REASONS = 12  # statistics in the technical table
PER_DAY = 1000
MAX_PER_DAY = 1_000_000  # the band is computed exactly, number by number
EMPTY = "The verdict appears here: choose an example, drop or paste an image, or take a photo."
NOT_KEPT = (
    "The page has lost this image's score, perhaps by a restart. Reload the page, or press Score."
)
MAPPED = (
    "Left: the image. Right: how unlikely each pixel is for the model. Brighter is less likely."
)
OUTLINED = "Outlined: parts of the picture that look unlike all parts of the calibration images."
NOT_OUTLINED = "No part of the picture is unusual enough to be outlined."
MOST_SHOWN = 1024  # pixels per side of an original
NOT_MAPPED = (
    "The image was resized. A map of unlikely pixels would show the resizing, so there is none."
)


def is_alpha(value: float | None) -> TypeGuard[float]:
    """Whether :func:`alpha_input` holds a rate: while one is typed, it is 0 or empty at first."""
    return value is not None and MIN_ALPHA <= value <= MAX_ALPHA


def original_of(data: bytes) -> str:
    """Write the original for the page to show, at most :data:`MOST_SHOWN` pixels per side."""
    original = Image.fromarray(read_image(data).pixels)
    original.thumbnail((MOST_SHOWN, MOST_SHOWN))
    return write_file(write_png(np.asarray(original)), "original.png")


def outlined_original(scored: Scored, alpha: float) -> tuple[Any, Any]:
    """The original with its unusual parts outlined, and a caption in HTML; of others, nothing."""
    regions = scored.result.regions
    if regions is None or not scored.original:
        return gr.skip(), gr.skip()
    with Image.open(io.BytesIO(read_file(scored.original))) as picture:
        drawn = outlined(np.asarray(picture), regions, alpha)
    found = OUTLINED if (regions.p_values <= alpha).any() else NOT_OUTLINED
    share = f"At most {percent(alpha)} of images like the calibration images get any outline."
    shown = gr.Image(write_file(write_png(drawn), "outlined.png"), visible=True)
    return shown, charts.caption(f"{found} {share}")


def pictures(pixels: np.ndarray, heat: bytes | None) -> tuple[Any, Any, str]:
    """The image over the map of its pixels, or by itself, and a caption in HTML."""
    if heat is None:
        seen = write_file(write_png(pixels), "seen.png")
        pair, alone = gr.ImageSlider(value=None, visible=False), gr.Image(seen, visible=True)
        return pair, alone, charts.caption(NOT_MAPPED)
    with Image.open(io.BytesIO(heat)) as picture:
        size = picture.size
    own = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    enlarged = np.asarray(own.convert("RGB").resize(size, Image.Resampling.NEAREST))
    both = write_file(write_png(enlarged), "image.png"), write_file(heat, "map.png")
    pair, alone = gr.ImageSlider(value=both, visible=True), gr.Image(None, visible=False)
    return pair, alone, charts.caption(MAPPED)


class ScoreTab:
    """The tab."""

    def __init__(self, context: TabContext) -> None:
        self.models = context.models
        examples(context, context.inbox.score)
        with gr.Row():
            with gr.Column(scale=2, min_width=280, elem_classes="ade-input"):
                context.inbox.score.render()
                self.alpha = alpha_input()
                self.resize = resize_input()
                self._lay_out_what_if(context)
                with gr.Accordion("More settings", open=False):
                    self.samples = slider(
                        1,
                        64,
                        value=1,
                        step=1,
                        label="Random draws (K)",
                        info="More give lower, more accurate bits per dimension (1: the ELBO) and "
                        "take longer. The verdict stays the same.",
                    )
                self.go = gr.Button("Score", variant="primary")
            with gr.Column(scale=3, min_width=280, elem_classes="ade-outcome"):
                self._lay_out_results()
        self._listen(context)

    def score(
        self, model: str, image: str, samples: float, alpha: float, resize: bool
    ) -> tuple[Any, ...]:
        """Score an image: verdict, image and map, place, reasons, details; the image, a caption."""
        data, client, bundle = read(image), self.models.clients[model], self.models.bundles[model]
        seen = as_seen(data, bundle, resize)
        given: Any = {"samples": int(samples), "alpha": alpha, "resize": resize}
        result = usable(ask(client.score, [data], map=True, **given)[0])
        calibrations = self.models.calibrations_of(model)
        # Without the map, it is small enough to be kept as long as the page is open.
        original = original_of(data) if seen.resized and result.regions is not None else ""
        scored = Scored(dataclasses.replace(result, map=None), seen.resized, original, alpha)
        card, place, why = explained(calibrations, scored, alpha)
        calibration = judge_of(calibrations, scored)
        details = charts.parts_chart(result.bpd_parts, result.bpd)
        if calibration is not None:
            details += charts.histogram_chart(calibration.bpd, result.bpd)
            details += charts.explain_table(result.explain[:REASONS])
        pair, alone, caption = pictures(seen.pixels, None if seen.resized else result.heat_map)
        picture: Any = gr.Image(None, visible=False)
        if original:
            alone = picture
            picture, caption = outlined_original(scored, alpha)
        return card, pair, place, why, details, alone, picture, caption, scored

    def judge(self, model: str, scored: Scored | None, alpha: float | None) -> tuple[Any, ...]:
        """Decide at another false-alarm rate, if it is another; the p-value stays."""
        if scored is None or not is_alpha(alpha) or alpha == scored.alpha:
            return (gr.skip(),) * 5
        return self.decide(model, scored, alpha)

    def decide(self, model: str, scored: Scored, alpha: float) -> tuple[Any, ...]:
        """Verdict, place, reasons, the outlined original and its caption."""
        calibrations = self.models.calibrations_of(model)
        return *explained(calibrations, scored, alpha), *outlined_original(scored, alpha)

    def judge_again(
        self, model: str, scored: Scored | None, alpha: float | None, image: Any, runs: Runs
    ) -> tuple[Any, ...]:
        """The same when alpha was moved: a verdict at the former one must not stay there."""
        # A run that has yet to end will show a verdict, and one that failed has shown its error.
        is_explained = runs.is_due or runs.under_way or 0 < runs.failed == runs.latest
        if image is not None and scored is None and not is_explained:
            return charts.problem(NOT_KEPT), "", "", None, ""
        if scored is None or not is_alpha(alpha):
            return (gr.skip(),) * 5
        return self.decide(model, scored, alpha)

    def what_if(self, model: str, alpha: float | None, per_day: float | None, resized: bool) -> Any:
        """What a level would mean for a day of images of the model's size or resized, HTML."""
        if not is_alpha(alpha):
            return gr.skip()
        calibration = self.models.calibrations_of(model).of(resized)
        if calibration is None:
            return charts.empty("There is no calibration for these images: none gets a verdict.")
        if per_day is None or not 1 <= per_day <= MAX_PER_DAY:
            return charts.empty(f"Images per day: a number from 1 to {MAX_PER_DAY:,}.")
        return charts.what_if(calibration, alpha, int(per_day))

    def _lay_out_what_if(self, context: TabContext) -> None:
        sizes = [("of the model's size", False), ("of other sizes", True)]
        with gr.Accordion("What if: alarms per day", open=False) as opened:
            per_day = gr.Number(
                PER_DAY,
                precision=0,
                minimum=1,
                maximum=MAX_PER_DAY,
                label="Images per day",
                info="Move the false-alarm rate above to compare.",
            )
            size = gr.Radio(sizes, value=False, label="Images")
            outlook = live(self.what_if(context.models.first, ALPHA, PER_DAY, False))
        model = context.model
        gr.on(
            [self.alpha.change, per_day.change, size.change, model.change, opened.expand],
            self.what_if,
            [model, self.alpha, per_day, size],
            outlook,
            **_TYPED,
        )

    def _lay_out_results(self) -> None:
        self.card = live(charts.empty(EMPTY))
        self.place = html()
        with gr.Row():
            with gr.Column(min_width=260):
                self.pair = image_pair("Image", "unlikely pixels")
                self.alone = image_strip("What the model sees", visible=False)
                self.outlined = image_output(
                    "The picture, unusual parts outlined",
                    visible=False,
                    height=None,
                    elem_classes="ade-outlined",
                )
                self.caption = html()
            with gr.Column(min_width=260):
                self.why = html()
        with gr.Accordion("Technical details", open=False):
            self.details = html()

    def _listen(self, context: TabContext) -> None:
        model, image, scored = context.model, context.inbox.score, gr.State()
        results: dict[Any, Any] = {
            self.card: charts.empty(EMPTY),
            self.pair: None,
            self.place: "",
            self.why: "",
            self.details: "",
            self.alone: None,
            self.outlined: None,
            self.caption: "",
            scored: None,
        }
        runs = run_on_new_image(
            context,
            [image],
            self.score,
            [model, image, self.samples, self.alpha, self.resize],
            results,
            self.card,
            self.go,
            "score",
        )
        parts = [self.card, self.place, self.why, self.outlined, self.caption]
        given = [model, scored, self.alpha, image, runs]
        self.alpha.change(self.judge_again, given, parts, **_TYPED)
        # The false-alarm rate may have been moved while the image was scored.
        scored.change(self.judge, given[:3], parts, **_TYPED)


# Gradio's checks report an error for each value of a number that is being typed.
_TYPED: Any = {
    "preprocess": False,
    "show_progress": "hidden",
    "trigger_mode": "always_last",
    **PRIVATE,
}
