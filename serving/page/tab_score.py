"""The tab *Score*: how likely an image is, and whether it looks like the known images."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from typing import Any, TypeGuard

import gradio as gr
import numpy as np
from PIL import Image

from ade_base.brand import percent, verdict_card
from ade_base.pictures.show import write_png
from ade_client.client import ScoreResult
from ade_client.contract import Choice
from serving.page import charts
from serving.page.files import write_file
from serving.page.served import (
    Runs,
    Served,
    Shared,
    as_seen,
    ask,
    examples,
    html,
    image_pair,
    live,
    read,
    resize_input,
    run_on_new_image,
    slider,
    usable,
)
from serving.verdict.calibration import Calibration
from serving.verdict.calibration_file import Calibrations
from serving.verdict.decision import decide

ALPHA = 0.01
MIN_ALPHA, MAX_ALPHA = 0.001, 0.2
REASONS = 12  # statistics in the technical table
PER_DAY = 1000
MAX_PER_DAY = 1_000_000  # the band is computed exactly, number by number
EMPTY = "The verdict appears here: choose an example, drop or paste an image, or take a photo."
REPLACED = (
    "The image was not scored with the page's calibration: that was replaced meanwhile, or an "
    "upgrade is under way and another model answered. Score the image again."
)
NOT_KEPT = (
    "The page has lost this image's score, perhaps by a restart. Reload the page, or press Score."
)
REASON_NOTES = ("nothing can be flagged", "no verdict: ")  # how notes begin that give the reason
WORDS = {"accept": "accepted", "reject": "rejected", "no_verdict": "no verdict"}


@dataclass(frozen=True, eq=False)
class Scored:
    """The result of an image, and whether it was resized; each is a change of the page's state."""

    result: ScoreResult
    resized: bool


def alpha_input(button: str | None = None) -> gr.Slider:
    """The input for the false-alarm rate.

    Args:
        button: that applies a change; ``None`` if changes apply at once.
    """
    info = "Share of images like the calibration images that are rejected by mistake."
    return slider(
        MIN_ALPHA,
        MAX_ALPHA,
        value=ALPHA,
        step=0.001,
        label="False-alarm rate (alpha)",
        info=info if button is None else f"{info} Press {button} to apply a change.",
    )


def is_alpha(value: float | None) -> TypeGuard[float]:
    """Whether :func:`alpha_input` holds a rate: while one is typed, it is 0 or empty at first."""
    return value is not None and MIN_ALPHA <= value <= MAX_ALPHA


def over(pixels: np.ndarray, heat: bytes) -> tuple[str, str]:
    """The image, enlarged to the size of its heat map, and the heat map; both PNG files."""
    with Image.open(io.BytesIO(heat)) as picture:
        size = picture.size
    own = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    shown = own.convert("RGB").resize(size, Image.Resampling.NEAREST)
    return write_file(write_png(np.asarray(shown)), "image.png"), write_file(heat, "map.png")


def explained(calibrations: Calibrations, scored: Scored, alpha: float) -> tuple[str, str, str]:
    """The parts that depend on the false-alarm rate: verdict, place and reasons; HTML."""
    result = scored.result
    calibration = judge_of(calibrations, scored)
    choice, sentence = verdict(calibrations, scored, alpha)
    facts = [f"{result.bpd:.3f} bits per dimension"]
    if result.standard_error is not None:
        facts[0] = f"{result.bpd:.3f} ± {result.standard_error:.2g} bits per dimension"
    if result.p_value is not None:
        facts.insert(0, f"p = {result.p_value:.2g}")
    card = verdict_card(choice, sentence, facts, notes_of(result))
    if calibration is None or result.ood_score is None:
        return card, "", ""
    place = charts.place_chart(calibration, result.ood_score, alpha)
    return card, place, charts.reasons(calibration, result.explain, alpha)


def notes_of(result: ScoreResult) -> list[str]:
    """The notes, without those that say why there is no verdict at the request's alpha.

    The sentence says it, at the alpha of the page.
    """
    return [note for note in result.notes if not note.startswith(REASON_NOTES)]


def judge_of(calibrations: Calibrations, scored: Scored) -> Calibration | None:
    """The calibration that judged an image; ``None`` if there was none or it is not the page's."""
    label = scored.result.calibration
    is_same = label is not None and label.version == calibrations.version
    return calibrations.of(scored.resized) if is_same else None


def verdict(calibrations: Calibrations, scored: Scored, alpha: float) -> tuple[Choice, str]:
    """The decision, and a sentence with the false-alarm rate and the reason."""
    result = scored.result
    calibration = judge_of(calibrations, scored)
    reason = result.decision_reason or ""
    if calibration is None and reason.startswith("calibration_broken"):
        return "no_verdict", _sentence(reason)  # a worker's, not the page's
    is_other = result.calibration or calibrations.of(scored.resized)
    if calibration is None and is_other and not calibrations.is_broken:
        return "no_verdict", REPLACED
    ruling = decide(result.p_value, calibrations, scored.resized, alpha)
    if ruling.reason is not None or calibration is None or result.p_value is None:
        return "no_verdict", _sentence(ruling.reason or "")
    count = len(calibration.scores)
    others = round(result.p_value * (count + 1)) - 1
    finding = "This image is not unusual enough to be rejected"
    how_many = f"{others:,}"
    if ruling.choice == "reject":
        finding = "This image looks unlike the calibration images"
        how_many = f"only {others:,}" if others else "none"
    verb = "is" if others in (0, 1) else "are"
    return ruling.choice, (
        f"{finding}: {how_many} of {count:,} calibration images {verb} at least as unusual. "
        f"False-alarm rate: {percent(alpha)}."
    )


def _sentence(reason: str) -> str:
    """A reason without its code."""
    text = reason.partition(": ")[2]
    return f"{text[:1].upper()}{text[1:]}."


def what_if(served: Served, model: str, alpha: float, per_day: float | None, resized: bool) -> str:
    """What a level would mean for a day of images, HTML.

    Args:
        served: the models.
        model: one of them.
        alpha: the level.
        per_day: images per day.
        resized: whether their size differs from the model's.
    """
    calibration = served.calibrations_of(model).of(resized)
    if calibration is None:
        return charts.empty("There is no calibration for these images: none gets a verdict.")
    if per_day is None or not 1 <= per_day <= MAX_PER_DAY:
        return charts.empty(f"Images per day: a number from 1 to {MAX_PER_DAY:,}.")
    return charts.what_if(calibration, alpha, int(per_day))


def add_tab(shared: Shared) -> None:
    """Lay the tab out."""
    served, image = shared.served, shared.inbox.score

    def score(
        model: str, image: str, samples: float, alpha: float, resize: bool
    ) -> tuple[str, tuple[str, str] | None, str, str, str, Scored]:
        """Score an image: verdict, image and heat map, place, reasons, technical details."""
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
        calibrations = served.calibrations_of(model)
        scored = Scored(result, seen.resized)
        card, place, why = explained(calibrations, scored, alpha)
        calibration = judge_of(calibrations, scored)
        details = charts.parts_chart(result.bpd_parts, result.bpd)
        if calibration is not None:
            details += charts.histogram_chart(calibration.bpd, result.bpd)
            details += charts.explain_table(result.explain[:REASONS])
        pair = over(seen.pixels, result.heat_map) if result.heat_map else None
        # Without the map, it is small enough to be kept as long as the page is open.
        scored = Scored(dataclasses.replace(result, map=None), seen.resized)
        return card, pair, place, why, details, scored

    def judge(model: str, scored: Scored | None, alpha: float | None) -> tuple[Any, Any, Any]:
        """Decide again at another false-alarm rate; the p-value stays."""
        if scored is None or not is_alpha(alpha):
            return gr.skip(), gr.skip(), gr.skip()
        return explained(served.calibrations_of(model), scored, alpha)

    def judge_again(
        model: str, scored: Scored | None, alpha: float | None, image: Any, runs: Runs
    ) -> tuple[Any, Any, Any]:
        """The same when alpha was moved: a verdict at the former one must not stay there."""
        # A run that has yet to end will show a verdict, and one that failed has shown its error.
        is_explained = runs.is_due or runs.under_way or 0 < runs.failed == runs.latest
        if image is not None and scored is None and not is_explained:
            return charts.problem(NOT_KEPT), "", ""
        return judge(model, scored, alpha)

    def what_if_of(model: str, alpha: float | None, per_day: float | None, resized: bool) -> Any:
        return what_if(served, model, alpha, per_day, resized) if is_alpha(alpha) else gr.skip()

    examples(image, shared.examples)
    with gr.Row():
        with gr.Column(scale=2, min_width=280, elem_classes="ade-input"):
            image.render()
            alpha = alpha_input()
            resize = resize_input()
            with gr.Accordion("What if: alarms per day", open=False) as outlooks:
                per_day = gr.Number(
                    PER_DAY,
                    precision=0,
                    minimum=1,
                    maximum=MAX_PER_DAY,
                    label="Images per day",
                    info="Move the false-alarm rate above to compare.",
                )
                way = gr.Radio(
                    [("of the model's size", False), ("of other sizes", True)],
                    value=False,
                    label="Images",
                )
                outlook = live(what_if(served, served.first, ALPHA, PER_DAY, False))
            with gr.Accordion("More settings", open=False):
                samples = slider(
                    1,
                    64,
                    value=1,
                    step=1,
                    label="Random draws (K)",
                    info="More give lower, more accurate bits per dimension (1: the ELBO) and take "
                    "longer. The verdict stays the same.",
                )
            go = gr.Button("Score", variant="primary")
        with gr.Column(scale=3, min_width=280, elem_classes="ade-outcome"):
            card = live(charts.empty(EMPTY))
            place = html()
            with gr.Row():
                with gr.Column(min_width=260):
                    pair = image_pair("Image", "unlikely pixels")
                    gr.Markdown(
                        "Left: the image at the model's size. Right: how unlikely each pixel is "
                        "for the model. Brighter is less likely.",
                        elem_classes="ade-caption",
                    )
                with gr.Column(min_width=260):
                    why = html()
            with gr.Accordion("Technical details", open=False):
                details = html()
    scored = gr.State()
    runs = run_on_new_image(
        shared,
        [image],
        shared.model,
        score,
        [shared.model, image, samples, alpha, resize],
        {card: charts.empty(EMPTY), pair: None, place: "", why: "", details: "", scored: None},
        card,
        go,
        "score",
    )
    listening: Any = {
        "preprocess": False,  # it reports an error for each value of a number that is being typed
        "show_progress": "hidden",
        "trigger_mode": "always_last",
        "api_visibility": "private",
    }
    gr.on(
        [alpha.change, per_day.change, way.change, shared.model.change, outlooks.expand],
        what_if_of,
        [shared.model, alpha, per_day, way],
        outlook,
        **listening,
    )
    alpha.change(
        judge_again, [shared.model, scored, alpha, image, runs], [card, place, why], **listening
    )
    # The false-alarm rate may have been moved while the image was scored.
    scored.change(judge, [shared.model, scored, alpha], [card, place, why], **listening)
