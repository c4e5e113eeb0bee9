"""Judges the paper's claims by the rows of a comparison."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from extensions.comparison.paper import BPD, BPD_ERROR, Finding, claims
from extensions.comparison.rows import SPACES, Row, number_text, used_spaces

SAME_BUDGET = 0.01  # relative difference up to which numbers of images count as equal


def judge_claims(rows: Sequence[Row]) -> list[tuple[Finding, str]]:
    """What these runs say about each claim that they can test, and the claim with its figures.

    Each seed is judged by itself, because seeds may have different budgets. A claim holds, or does
    not, only if all of them say so.
    """
    found = []
    for claim in claims(tuple(used_spaces(rows))):
        measured = [row for row in rows if row.measured]
        candidates = _comparable(
            [[row for row in measured if row.system == name] for name in claim.systems]
        )
        if not candidates:
            continue
        if _shared_budget(candidates[0]) is None:
            *first, last = (f"{row.learned:,}" for row in candidates[0])
            counts = f"{', '.join(first)} and {last}"
            found.append((Finding.UNDECIDED, f"{claim.text} (after {counts} images)"))
            continue
        findings, texts = set(), []
        for chosen in candidates:
            figures = [_deciding(row) for row in chosen]
            shown = [
                f"{SPACES.get(n, 'BPD')} {' against '.join(number_text(f[n]) for f in figures)}"
                for n in claim.figures
                if all(f[n] is not None for f in figures)
            ]
            if shown:
                findings.add(claim.judge(figures))
                budget = _shared_budget(chosen)
                texts.append(f"after {budget}, {_seeds(chosen)}: {'; '.join(shown)}")
        if findings:
            finding = findings.pop() if len(findings) == 1 else Finding.UNDECIDED
            found.append((finding, f"{claim.text} ({'; '.join(texts)})"))
    return found


def _seeds(rows: Sequence[Row]) -> str:
    seeds = sorted({row.seed for row in rows})
    return f"seed{'s' * (len(seeds) > 1)} {' and '.join(map(str, seeds))}"


def _deciding(row: Row) -> dict[str, float | None]:
    """The figures that decide claims: reliable ones, and the standard error of the bits."""
    assert row.measured is not None
    distances = {space: row.distance(space) for space in SPACES}
    return {
        BPD: row.measured.bpd,
        BPD_ERROR: row.measured.bpd_error,
        **{s: d.frechet if d and d.is_reliable else None for s, d in distances.items()},
    }


def _comparable(runs: list[list[Row]]) -> list[tuple[Row, ...]]:
    """Choose runs to judge by, one of each system: those of each seed, if their budgets are equal.

    Where no seed has all systems, it is those of several seeds that learned most. There are none
    unless one version of the program trained all systems on the same data and at the same size, and
    measured them alike.
    """
    alike = [rows for rows in itertools.product(*runs) if _are_alike(rows)]
    candidates = [rows for rows in alike if _shared_budget(rows)] or alike
    candidates.sort(key=lambda rows: min(row.learned for row in rows), reverse=True)
    of_one_seed = [rows for rows in candidates if len({row.seed for row in rows}) == 1]
    return of_one_seed or candidates[:1]


def _are_alike(rows: Sequence[Row]) -> bool:
    """Whether data, sizes, the settings that a version's recipes share, and measurements agree."""

    def shared(row: Row) -> tuple[object, ...]:
        config, measured = row.config, row.measured
        assert measured is not None
        return (
            row.data,
            config.size,
            config.model.image_size,
            config.cooldown,
            config.ema_decay,
            measured.split,
            measured.images,
            measured.how.get("resnet20"),
            measured.how["samples"],
        )

    return len({shared(row) for row in rows}) == 1


def _shared_budget(rows: Sequence[Row]) -> str | None:
    """The budget that runs share: a number of images or a time; ``None`` if neither."""
    first = rows[0]
    if all(math.isclose(first.learned, row.learned, rel_tol=SAME_BUDGET) for row in rows):
        return f"{first.learned:,} images"
    minutes = first.minutes_budget
    if minutes is None:
        return None
    timed = all(row.minutes_budget == minutes and row.is_ended for row in rows)
    return f"{minutes:g} minutes" if timed else None
