"""What a gate catches, what it misses and how sure its false-alarm rate is, in a few sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ade_base.brand import percent
from ade_client.contract import Choice
from serving.verdict.decision import images_needed
from serving.verdict.false_alarms import false_alarm_band

CAUGHT = 0.9  # a set counts as caught, if this share of it is rejected
MORE = 1000  # calibration images that may be had


@dataclass(frozen=True)
class GateSummary:
    """For the head of a report.

    Attributes:
        choice: its colour: ``accept`` if everything was caught.
        heading: a few words.
        sentence: what is caught and what is missed.
        notes: how exact the false-alarm rate is, and what would make it more so.
    """

    choice: Choice
    heading: str
    sentence: str
    notes: list[str]


def summarize(shares: Mapping[str, float | None], calibrated: int, alpha: float) -> GateSummary:
    """Sum up a measurement of a gate.

    Args:
        shares: of each set of OOD or corrupted images, how much is rejected at ``alpha``; ``None``
            without a verdict.
        calibrated: number of calibration images.
        alpha: the false-alarm rate.
    """
    rate = percent(alpha)
    low, high = false_alarm_band(calibrated, alpha)
    if high == 0:
        return GateSummary(
            "no_verdict",
            "This gate gives no verdict",
            f"At a false-alarm rate of {rate} it needs {images_needed(alpha):,} calibration images "
            f"or more; it has {calibrated:,}.",
            [],
        )
    measured = {name: share for name, share in shares.items() if share is not None}
    caught = [name for name, share in measured.items() if share >= CAUGHT]
    missed = [f"{name} ({percent(share)})" for name, share in measured.items() if share < CAUGHT]
    # Names contain commas.
    parts = []
    if caught:
        parts.append(
            f"rejects at least {percent(CAUGHT)} of the images of these kinds: {'; '.join(caught)}"
        )
    if missed:
        parts.append(f"rejects only a part of these: {'; '.join(missed)}")
    if not parts:
        parts = ["was tried on no out-of-distribution images"]
    sentence = f"At a false-alarm rate of {rate}, this gate {'. It '.join(parts)}."
    narrow, wide = false_alarm_band(calibrated + MORE, alpha)
    notes = [
        f"Its true false-alarm rate lies between {percent(low)} and {percent(high)} with a "
        f"probability of 95 % (or below it, if a picture repeats among the calibration images): "
        f"{calibrated:,} images calibrated it. {MORE:,} more calibration images would narrow the "
        f"band to {percent(narrow)} to {percent(wide)}."
    ]
    count = f"{len(caught)} of {len(measured)} kinds of images"
    choice: Choice = "accept" if caught and not missed else "reject" if missed else "no_verdict"
    heading = f"Catches {count}" if measured else "Not tried yet"
    return GateSummary(choice, heading, sentence, notes)
