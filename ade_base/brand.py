"""What gives the page, the reports and the pictures one look: name, logo, style sheet, verdict.

The style sheet needs nothing else. A report embeds it whole::

    <style>{STYLE}</style> … <header class="ade-head">{MARK}<h1>{NAME}</h1></header>
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

NAME = "AV-ADE"
MARK_FILE = Path(__file__).with_name("mark.svg")
MARK = MARK_FILE.read_text().strip()
STYLE = Path(__file__).with_name("style.css").read_text()

ICONS = {
    "accept": "M5 17.5l7 7 15-16",
    "reject": "M7 7l18 18M25 7L7 25",
    "no_verdict": "M10.5 11.5a5.5 5.5 0 1 1 8 5c-1.8 1-2.5 2-2.5 4M16 25.5v.1",
}
HEADINGS = {"accept": "Accepted", "reject": "Rejected", "no_verdict": "No verdict"}


def percent(share: float) -> str:
    """A share in per cent, as it is read out: ``0.01`` is ``1 %``."""
    return f"{100 * share:.3g}\u00a0%"


def rounded(number: float) -> str:
    """A number of at least 0 with two digits, or as a whole number."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def verdict_card(
    choice: str,
    sentence: str,
    facts: Sequence[str] = (),
    notes: Sequence[str] = (),
    heading: str | None = None,
) -> str:
    """The decision in its colour, the sentence that explains it, figures and notes."""
    icon = (
        '<svg viewBox="0 0 32 32" aria-hidden="true" fill="none" stroke="currentColor" '
        'stroke-width="4" stroke-linecap="round" stroke-linejoin="round">'
        f'<path d="{ICONS[choice]}"/></svg>'
    )
    shown = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    noted = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<section class="ade-verdict ade-{choice}">{icon}'
        f"<h2>{escape(heading or HEADINGS[choice])}</h2><p>{escape(sentence)}</p>"
        + (f'<ul class="ade-facts">{shown}</ul>' if facts else "")
        + (f'<ul class="ade-notes">{noted}</ul>' if notes else "")
        + "</section>"
    )
