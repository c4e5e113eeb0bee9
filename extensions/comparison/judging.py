"""Judges the paper's claims by the rows of a comparison."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from extensions.comparison.measure import INCEPTION
from extensions.comparison.paper import BPD_ERROR, Finding, claims
from extensions.comparison.rows import (
    SPACES,
    figures_of,
    learned,
    number_text,
    used_spaces,
)

SAME_BUDGET = 0.01  # relative difference up to which numbers of images count as equal


def judge_claims(rows: Sequence[dict[str, Any]]) -> list[tuple[Finding, str]]:
    """What these runs say about each claim that they can test, and the claim with its figures.

    Each seed is judged by itself, because seeds may have different budgets. A claim holds, or does
    not, only if all of them say so.
    """
    found = []
    for claim in claims(tuple(used_spaces(rows))):
        candidates = _comparable([_measured_runs(rows, name) for name in claim.systems])
        if not candidates:
            continue
        if _shared_budget(candidates[0]) is None:
            *first, last = (f"{learned(row):,}" for row in candidates[0])
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


def _seeds(rows: Sequence[dict[str, Any]]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    return f"seed{'s' * (len(seeds) > 1)} {' and '.join(map(str, seeds))}"


def _deciding(row: dict[str, Any]) -> dict[str, float | None]:
    """The figures that decide claims: reliable ones, and the standard error of the bits."""
    measured = row["measured"] or {}
    found = dict(measured.get("distances", {}).get("mean", {}))
    found[INCEPTION] = measured.get("inception", {}).get("fid", {}).get("50000", {})
    unreliable = dict.fromkeys(s for s, value in found.items() if "rank_deficient" in value)
    error = measured.get("elbo", {}).get("standard_error")
    return {**figures_of(row), **unreliable, BPD_ERROR: error}


def _measured_runs(rows: Sequence[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["measured"] and row["config"].recipe == system]


def _comparable(runs: list[list[dict[str, Any]]]) -> list[tuple[dict[str, Any], ...]]:
    """Choose runs to judge by, one of each system: those of each seed, if their budgets are equal.

    Where no seed has all systems, it is those of several seeds that learned most. There are none
    unless one version of the program trained all systems on the same data and at the same size, and
    measured them alike.
    """
    alike = [rows for rows in itertools.product(*runs) if _are_alike(rows)]
    candidates = [rows for rows in alike if _shared_budget(rows)] or alike
    candidates.sort(key=lambda rows: min(map(learned, rows)), reverse=True)
    of_one_seed = [rows for rows in candidates if len({row["seed"] for row in rows}) == 1]
    return of_one_seed or candidates[:1]


def _are_alike(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether data, sizes, the settings that a version's recipes share, and measurements agree."""

    def shared(row: dict[str, Any]) -> tuple[object, ...]:
        config, measured = row["config"], row["measured"]
        return (
            row["data"],
            config.size,
            config.model.image_size,
            config.cooldown,
            config.ema_decay,
            measured["split"],
            measured["images"],
            measured["how"].get("resnet20"),
            measured["how"]["samples"],
            measured["how"]["efficientnet_samples"],
        )

    return len({shared(row) for row in rows}) == 1


def _learning_seconds(row: dict[str, Any]) -> float:
    """Seconds of training, of a GAN those of its generator alone."""
    state = row["state"]
    return float(state.get("generator_seconds") or state["seconds"])


def _shared_budget(rows: Sequence[dict[str, Any]]) -> str | None:
    """The budget that runs share: a number of images or a time; ``None`` if neither."""
    first = rows[0]
    if all(math.isclose(learned(first), learned(row), rel_tol=SAME_BUDGET) for row in rows):
        return f"{learned(first):,} images"
    minutes = first["budget"]["minutes"]
    timed = minutes is not None and all(
        row["budget"]["minutes"] == minutes and _learning_seconds(row) >= 60 * minutes
        for row in rows
    )
    return f"{minutes:g} minutes" if timed else None
