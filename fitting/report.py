"""The report of a fitting: ``report.html``, one file that needs no other."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ade_base.brand import percent, verdict_card
from ade_base.files import write_text
from ade_base.panel import panel_rows
from ade_base.pictures.show import tile, write_png
from ade_base.reports import render
from fitting.plan import Plan
from fitting.survey import Survey
from serving.engine.bundle import Bundle
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.decision import images_needed
from serving.verdict.false_alarms import false_alarm_band
from serving.verdict.summary import summarize

ALPHAS = (0.1, 0.05, 0.01)
MIN_EPOCHS = 3.0
ENOUGH_SEEN = 10_000  # training images, whether or not they were the same ones
MIN_CALIBRATED = 1000
MIN_REJECTED = 0.9  # of each gross corruption, at VERDICT_ALPHA
VERDICT_ALPHA = 0.05
DEFAULT_ALPHA = ALPHAS[-1]  # of a request that names none
SHOWN = 20  # broken files, and groups of duplicates
TEMPLATE = "report.html"


@dataclass(frozen=True)
class Outlier:
    """A training image with its verdict; ``pixels``, which show it, are uint8 ``(H, W, C)``."""

    path: str
    p_value: float
    bpd: float
    pixels: np.ndarray


@dataclass(frozen=True)
class FalseAlarms:
    """The share of test images of one kind rejected at one alpha, and where it should lie.

    Attributes:
        alpha: the false-alarm rate.
        rejected: share of the images that is rejected.
        low: lower end of the band in which it should lie.
        high: its upper end.
        resized: whether the images' size differs from the model's.
        tested: their number.
    """

    alpha: float
    rejected: float
    low: float
    high: float
    resized: bool
    tested: int

    @property
    def is_possible(self) -> bool:
        """Whether the calibration has enough images to reject any at this alpha."""
        return self.high > 0

    @property
    def is_expected(self) -> bool:
        return self.low <= self.rejected <= self.high


@dataclass(frozen=True)
class Caught:
    """Shares of corrupted held-out images rejected at each of :data:`ALPHAS`.

    A share is ``None`` where there is no verdict. All images with a ``gross`` corruption should be
    rejected.
    """

    corruption: str
    gross: bool
    rejected: tuple[float | None, ...]


@dataclass(frozen=True)
class EncoderFindings:
    """What became of the verdict's encoder.

    Attributes:
        images_seen: that gave the spread of its features, and its classes.
        classes: that it has learnt; 0 for images without classes.
        is_given_up: whether it does without classes, because it recognised them no better than
            guessing does.
        recognised: share of the test images whose class it recognises.
        guessed: share of the test images in the largest class: what guessing would reach.
    """

    images_seen: int
    classes: int
    is_given_up: bool
    recognised: float = 0.0
    guessed: float = 0.0


@dataclass(frozen=True)
class Findings:
    """Everything that the report shows.

    Attributes:
        plan: of the fitting.
        survey: of the images' folder.
        bundle: the calibrated bundle.
        samples: uint8 ``(N, H, W, C)``.
        held_out: some test images, uint8 ``(N, H, W, C)``.
        rebuilt: their reconstructions.
        alarms: false alarms among test images, by kind (resized or not) and alpha.
        scanned: number of training images that were scored.
        outliers: those among them with the highest OOD scores.
        corrupted: number of held-out images that were corrupted.
        caught: shares of them that were rejected.
        encoder: of the verdict; ``None`` if it sees the originals.
    """

    plan: Plan
    survey: Survey
    bundle: Bundle
    samples: np.ndarray
    held_out: np.ndarray
    rebuilt: np.ndarray
    alarms: list[FalseAlarms]
    scanned: int
    outliers: list[Outlier]
    corrupted: int
    caught: list[Caught]
    encoder: EncoderFindings | None

    @property
    def calibrated(self) -> int:
        """Number of images that calibrated the verdict, for the kind that has fewer."""
        return min(_calibrated(self.bundle, resized) for resized in (False, True))


def _calibrated(bundle: Bundle, resized: bool) -> int:
    """Number of images that calibrated the verdict on images that were or were not resized."""
    about = bundle.manifest.get("calibration") or {}
    return int(((about.get("resized") or {}) if resized else about).get("images", 0))


def false_alarms(
    p_values: Mapping[bool, Sequence[float]], calibrations: CalibrationPair
) -> list[FalseAlarms]:
    """Measure how often in-distribution test images are rejected.

    The bands are those of each kind's calibration and number of tests. All of them together hold
    the shares of 95 of 100 such gates.

    Args:
        p_values: of the test images that were resized (``True``) and of those that were not.
        calibrations: of the bundle, which judged them.
    """
    found = []
    kinds = {resized: np.asarray(its) for resized, its in p_values.items() if len(its)}
    level = 1 - 0.05 / max(len(ALPHAS) * len(kinds), 1)  # Bonferroni
    for resized, its in sorted(kinds.items()):
        calibration = calibrations.of(resized)
        assert calibration is not None, "there are verdicts"
        for alpha in ALPHAS:
            band = calibration.false_alarm_band(alpha, level, len(its))
            rejected = float((its <= alpha).mean())
            found.append(FalseAlarms(alpha, rejected, *band, resized, len(its)))
    return found


def write_report(findings: Findings, path: Path) -> None:
    """Write the page."""
    both = np.concatenate([findings.held_out, findings.rebuilt])
    page = render(
        f"Gate for {findings.plan.name}: report of ade fit",
        _verdict(findings),
        template=TEMPLATE,
        package="fitting",
        filters={"number": "{:,}".format, "percent": percent, "png": _png},
        **vars(findings),
        folder=shlex.quote(str(findings.bundle.folder)),
        panel=panel_rows(findings.bundle.manifest["evaluation"]["test"]["figures"]),
        alphas=ALPHAS,
        alpha=_alpha_of(findings.calibrated),
        shown=SHOWN,
        sample_grid=tile(findings.samples, 16),
        reconstruction_grid=tile(both, len(findings.held_out)),
    )
    write_text(path, page)


def _alpha_of(calibrated: int) -> float | None:
    """The smallest usual alpha that has verdicts; ``None`` for the default one."""
    possible = [a for a in (DEFAULT_ALPHA, 0.02, 0.05, 0.1) if calibrated >= images_needed(a)]
    alpha = min(possible, default=None)
    return None if alpha == DEFAULT_ALPHA else alpha


def _verdict(findings: Findings) -> str:
    """The head of the report: whether to rely on the gate, what it catches and what it misses."""
    column = ALPHAS.index(VERDICT_ALPHA)
    shares = {row.corruption: row.rejected[column] for row in findings.caught}
    summary = summarize(shares, findings.calibrated, VERDICT_ALPHA)
    found = weaknesses(findings)
    if found:
        heading = "Do not rely on this gate yet"
        return verdict_card("reject", summary.sentence, (), [*found, *summary.notes], heading)
    known = (
        "No weakness was found: false alarms come at the chosen rate, and gross corruptions are "
        "rejected. Other OOD images may still pass: try the kinds that you expect with "
        "ade ood-bench. If the images are frames of recordings or bursts, try another recording, "
        "too: these rates were measured on neighbours of the training images."
    )
    heading = "The gate works on what it was tried on"
    if any(share is not None and share < MIN_REJECTED for share in shares.values()):  # subtle ones
        heading = "The gate works, but many subtle corruptions pass"
    rough = []
    if findings.calibrated < MIN_CALIBRATED:
        heading += ", and its false-alarm rate is rough"
        rough = [_few(findings.calibrated)]
    return verdict_card("accept", summary.sentence, (), [*rough, known, *summary.notes], heading)


def epochs(training: dict[str, Any] | None, images: int) -> float:
    """How often a model has seen each training image, in all the runs that it comes from."""
    seen = 0
    while training:
        seen += training.get("images_seen") or 0
        training = training.get("started_from")
    return seen / max(images, 1)


def weaknesses(findings: Findings) -> list[str]:
    """Reasons not to rely on the gate yet, as sentences; empty if there is none."""
    found = []
    calibrated = findings.calibrated
    seen = epochs(findings.bundle.manifest.get("training"), findings.survey.parts["train"])
    trained = findings.survey.parts["train"]
    if seen * trained < min(MIN_EPOCHS * trained, ENOUGH_SEEN):
        found.append(
            f"The model has seen each of {trained:,} training images {seen:.1f} times; "
            f"{MIN_EPOCHS:g} times, or {ENOUGH_SEEN:,} images in all, are advisable: give it a "
            "larger budget."
        )
    if calibrated < images_needed(DEFAULT_ALPHA):
        found.append(_few(calibrated))
    found += [
        f"At alpha {alarm.alpha:g}, {alarm.rejected:.3f} of the {_kind(alarm)} are rejected; "
        f"{alarm.low:.3f} to {alarm.high:.3f} are expected."
        for alarm in findings.alarms
        if alarm.is_possible and not alarm.is_expected
    ]
    column = ALPHAS.index(VERDICT_ALPHA)
    found += [
        f"At alpha {VERDICT_ALPHA:g}, only {percent(share)} of corrupted images are rejected: "
        f"{caught.corruption}."
        for caught in findings.caught
        if caught.gross and (share := caught.rejected[column]) is not None and share < MIN_REJECTED
    ]
    return found


def _few(calibrated: int) -> str:
    """What it means that few images calibrated the verdict, as a sentence."""
    low, high = false_alarm_band(calibrated, VERDICT_ALPHA)
    nothing = (
        f"; at the default alpha of {DEFAULT_ALPHA:g}, nothing can be rejected"
        if calibrated < images_needed(DEFAULT_ALPHA)
        else ""
    )
    return (
        f"{calibrated:,} images (8 of 100 files) calibrated the verdict; "
        f"{MIN_CALIBRATED:,} or more are advisable (ade calibrate makes a bundle with others that "
        f"are not in this folder): at alpha {VERDICT_ALPHA:g} the false-alarm rate may lie "
        f"anywhere from {low:.3f} to {high:.3f}{nothing}."
    )


def _kind(alarm: FalseAlarms) -> str:
    return "resized test images" if alarm.resized else "test images of the model's size"


def _png(pixels: np.ndarray) -> str:
    """A data URL of uint8 ``(H, W, C)``."""
    return f"data:image/png;base64,{base64.b64encode(write_png(pixels)).decode()}"
