"""From a verdict to a decision: accept the image, reject it, or report that there is no verdict.

An image is accepted only if a calibration for its kind (resized or not) could have rejected it and
did not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ade_client.contract import Choice
from serving.verdict.calibration_file import CalibrationPair

TINY = 1e-300  # smallest divisor that does not overflow
MANY = 10**9  # images, above which a number is not told exactly


@dataclass(frozen=True)
class Decision:
    """A choice, with the reason if there is no verdict.

    Attributes:
        choice: ``no_verdict`` unless a calibration supports one of the others.
        reason: why there is no verdict: a code, a colon and a sentence. ``None`` with a verdict.
    """

    choice: Choice
    reason: str | None = None

    @property
    def ood(self) -> bool | None:
        """Whether the image is rejected; ``None`` without a verdict."""
        return None if self.choice == "no_verdict" else self.choice == "reject"


def decide(
    p_value: float | None, calibrations: CalibrationPair, resized: bool, alpha: float
) -> Decision:
    """Decide on an image that was scored.

    Args:
        p_value: p-value of its verdict; ``None`` without one.
        calibrations: of the bundle.
        resized: whether the image was resized to the model's size.
        alpha: false-alarm rate, above 0 and at most 1.

    Raises:
        ValueError: alpha is out of range.
    """
    if not 0 < alpha <= 1:  # not a number compares as false: it would accept every image
        raise ValueError(f"alpha must be above 0 and at most 1, got {alpha}")
    calibration = calibrations.of(resized)
    if calibration is None:
        if resized and calibrations.exact is not None:
            return Decision(
                "no_verdict",
                "resized_not_calibrated: the bundle has no calibration for resized images; "
                "ade calibrate makes one",
            )
        return Decision(
            "no_verdict", "not_calibrated: the bundle has no calibration; ade calibrate makes one"
        )
    if p_value is None or not math.isfinite(p_value):
        return Decision("no_verdict", "not_finite: the p-value is not a finite number")
    if alpha < calibration.smallest_p_value:
        return Decision(
            "no_verdict",
            f"alpha_too_small: alpha {alpha:g} needs {_many(images_needed(alpha))} calibration "
            f"images or more; there are {len(calibration.scores):,}",
        )
    return Decision("reject" if p_value <= alpha else "accept")


def images_needed(p_value: float) -> int:
    """Number of calibration images whose smallest p-value, 1/(n + 1), is at most ``p_value``."""
    return max(0, math.ceil(1 / max(p_value, TINY) - 1e-9) - 1)


def _many(count: int) -> str:
    return f"{count:,}" if count < MANY else f"more than {MANY:,}"


TWO_CALIBRATIONS = (
    "two calibrations judged these images, one the resized images and one the others: the "
    "guarantees for a group hold only if a single calibration judges all its images"
)


def fdr_note(calibrated: int, count: int, fdr: float) -> str | None:
    """A note on discoveries that too few calibration images make impossible, or ``None``.

    Benjamini and Hochberg's procedure reports ``k`` of ``count`` images only if k p-values are at
    most ``fdr k / count``.

    Args:
        calibrated: number of calibration images; the smallest p-value is ``1 / (calibrated + 1)``.
        count: number of images that are judged together.
        fdr: false discovery rate.
    """
    fewest = math.ceil(count / max(fdr * (calibrated + 1), TINY) - 1e-9)
    if fewest <= 1:
        return None
    smallest = f"1/{calibrated + 1}"
    who = (
        f"none of {count} images can be reported: the smallest p-value is {smallest}"
        if fewest > count
        else f"at least {fewest} of {count} images must have the smallest p-value, {smallest}, "
        "before any is reported"
    )
    return (
        f"at a false discovery rate of {fdr:g}, {who}; to report a single one takes "
        f"{_many(images_needed(fdr / count))} calibration images"
    )
