"""What a gate catches, what it misses and how sure its false-alarm rate is, in a few sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serving.verdict.decision import Choice, images_needed
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
    rate = f"{100 * alpha:.3g}\u00a0%"
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
    missed = [f"{name} ({share:.0%} caught)" for name, share in measured.items() if share < CAUGHT]
    parts = [f"catches {_listed(caught)}"] if caught else []
    parts += [f"misses much of {_listed(missed)}"] if missed else []
    if not parts:
        parts = ["was tried on no out-of-distribution images"]
    sentence = f"At a false-alarm rate of {rate}, this gate {'; it '.join(parts)}."
    narrow, wide = false_alarm_band(calibrated + MORE, alpha)
    notes = [
        f"Its true false-alarm rate lies between {low:.2%} and {high:.2%} with a probability of "
        f"95 %: {calibrated:,} images calibrated it. {MORE:,} more images would narrow the band to "
        f"{narrow:.2%} to {wide:.2%}."
    ]
    count = f"{len(caught)} of {len(measured)} kinds of images"
    choice: Choice = "accept" if caught and not missed else "reject" if missed else "no_verdict"
    heading = f"Catches {count}" if measured else "Not tried yet"
    return GateSummary(choice, heading, sentence, notes)


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
