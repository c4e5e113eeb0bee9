"""The answer to ``ade gate what-if`` as Markdown, and as an HTML page."""

from __future__ import annotations

from pathlib import Path

from ade_base.brand import percent, rounded, verdict_card
from ade_base.files import write_text
from ade_base.reports import from_markdown, markdown_table, render
from extensions.gate_reports.what_if import PathForecast, WhatIf
from serving.verdict.summary import summarize

VERDICT_ALPHA = 0.01


def write_what_if(found: WhatIf, path: Path) -> None:
    """Write the page; what the gate catches comes first.

    Raises:
        OSError: the file cannot be written.
    """
    column = found.alphas.index(VERDICT_ALPHA)
    judged = [way for way in found.ways if way.alarms and way.alarms[column].per_day is not None]
    # Of two calibrations, the one of fewer images has the wider band.
    calibrated = min((way.calibrated for way in judged or found.ways), default=0)
    without = [f"{_kind(way)}: no verdict at this rate." for way in found.ways if way not in judged]
    shares = {name: its[column] for name, its in found.caught.items()}
    unjudged = [name for name, share in shares.items() if share is None]
    if unjudged and judged:
        without.append(f"No verdict on these at this rate: {'; '.join(unjudged)}.")
    summary = summarize(shares, calibrated, VERDICT_ALPHA)
    page = render(
        "What this gate would do in a day",
        verdict_card(
            summary.choice, summary.sentence, (), [*without, *summary.notes], summary.heading
        ),
        subtitle=gate_of(found),
        content=from_markdown(what_if_lines(found)),
    )
    write_text(path, page)


def gate_of(found: WhatIf) -> str:
    """The model and its calibration."""
    label = found.calibration or {}
    return f"{found.model}, calibration {label.get('name')}, version {label.get('version')}"


def what_if_lines(found: WhatIf) -> list[str]:
    """All tables as Markdown."""
    unusable = f" {found.unusable:,} files could not be used." if found.unusable else ""
    lines = ["## Alarms per day", "", f"The history has {found.images:,} images.{unusable}", ""]
    for way in found.ways:
        lines += _way(way)
    header = ["rejected at alpha", *(f"{alpha:g}" for alpha in found.alphas)]
    body = [[name, *map(_share, shares)] for name, shares in found.caught.items()]
    return [*lines, "## What is caught", "", *markdown_table(header, body), ""]


def _kind(way: PathForecast) -> str:
    return "Images of another size, resized" if way.resized else "Images of the model's size"


def _way(way: PathForecast) -> list[str]:
    lines = [f"### {_kind(way)}: {way.images:,} of the history, {way.per_day:,} per day", ""]
    if not way.calibrated:
        return [*lines, "There is no calibration for them: no verdict, none is accepted.", ""]
    header = ["alpha", "false alarms per day", "95 % band", "rejected of the history"]
    body = [
        [f"{row.alpha:g}", "no verdict", "", ""]
        if row.per_day is None
        else [
            f"{row.alpha:g}",
            rounded(row.per_day),
            f"{row.low:,} to {row.high:,}",
            _share(row.rejected),
        ]
        for row in way.alarms
    ]
    lines += [f"Calibrated on {way.calibrated:,} images.", "", *markdown_table(header, body), ""]
    if way.known:
        lines += [
            f"{way.known:,} images of the history made the calibration, or are copies of such "
            "images. The gate rejects these less often than new ones, and they do not tell whether "
            "the history is like the calibration images.",
            "",
        ]
    if way.unlike:
        alphas = ", ".join(f"{alpha:g}" for alpha in way.unlike)
        lines += [
            f"**The history is not like the calibration images**, see alpha {alphas}: calibrate on "
            "images like these.",
            "",
        ]
    return lines


def _share(share: float | None) -> str:
    return "no verdict" if share is None else percent(share)
