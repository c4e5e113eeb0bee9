"""A score in words: the decision, the reason, and what the calibration says of it."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from ade_base.brand import percent, verdict_card
from ade_client.client import ScoreResult
from ade_client.contract import Choice
from serving.page import charts
from serving.page.inputs import slider
from serving.verdict.calibration import Calibration
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.decision import decide

ALPHA = 0.01
MIN_ALPHA, MAX_ALPHA = 0.001, 0.2
REPLACED = (
    "The image was not scored with the page's calibration: a release was published meanwhile, "
    "and another one answered. Score the image again."
)
REASON_NOTES = ("nothing can be flagged", "no verdict: ")  # how notes begin that give the reason
WORDS = {"accept": "accepted", "reject": "rejected", "no_verdict": "no verdict"}


@dataclass(frozen=True, eq=False)
class Scored:
    """The result of an image; each is a change of the page's state.

    Attributes:
        result: with ``regions`` if the original is shown with them, and without ``map``.
        resized: whether the image was resized.
        original: a file of the original, smaller if it is large; empty if it is not shown.
        alpha: at which it was outlined.
    """

    result: ScoreResult
    resized: bool
    original: str = ""
    alpha: float = ALPHA


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


def explained(calibrations: CalibrationPair, scored: Scored, alpha: float) -> tuple[str, str, str]:
    """The parts that depend on the false-alarm rate: verdict, place and reasons; HTML."""
    result = scored.result
    calibration = judge_of(calibrations, scored)
    choice, sentence = verdict(calibrations, scored, alpha)
    card = verdict_card(choice, sentence, facts_of(result), notes_of(result))
    if calibration is None or result.ood_score is None:
        return card, "", ""
    place = charts.place_chart(calibration, result.ood_score, alpha)
    return card, place, charts.reasons(calibration, result.explain, alpha)


def facts_of(result: ScoreResult) -> list[str]:
    """The p-value, if there is one, and the likelihood."""
    error = "" if result.standard_error is None else f" ± {result.standard_error:.2g}"
    known = [] if result.p_value is None else [f"p = {result.p_value:.2g}"]
    return [*known, f"{result.bpd:.3f}{error} bits per dimension"]


def notes_of(result: ScoreResult) -> list[str]:
    """The notes, without those that say why there is no verdict at the request's alpha.

    The sentence says it, at the alpha of the page.
    """
    return [note for note in result.notes if not note.startswith(REASON_NOTES)]


def judge_of(calibrations: CalibrationPair, scored: Scored) -> Calibration | None:
    """The calibration that judged an image; ``None`` if there was none or it is not the page's."""
    label = scored.result.calibration
    is_same = label is not None and label.version == calibrations.version
    return calibrations.of(scored.resized) if is_same else None


def verdict(calibrations: CalibrationPair, scored: Scored, alpha: float) -> tuple[Choice, str]:
    """The decision, and a sentence with the false-alarm rate and the reason."""
    result = scored.result
    calibration = judge_of(calibrations, scored)
    is_other = result.calibration or calibrations.of(scored.resized)
    if calibration is None and is_other:
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
