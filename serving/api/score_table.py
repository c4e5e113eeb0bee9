"""Tables of scores: ``ade score`` and the page write the same columns."""

from __future__ import annotations

from typing import Any

from ade_client.contract import NOT_SCORED, ScoreResult
from serving.engine.bundle import Bundle
from serving.verdict.statistics import part_names


def columns(bundle: Bundle, samples: int) -> list[str]:
    """Names of the columns; a value that a row lacks is empty."""
    parts = [
        "dequantization",
        *part_names(len(bundle.latent_shapes)),
        *(["iwae_gap"] if samples > 1 else []),
    ]
    return [
        "path",
        "bpd",
        *parts,
        "ood_score",
        "p_value",
        "ood",
        "error",
        "notes",
        "decision",
        "decision_reason",
        "calibration",
    ]


def scored_row(path: str, result: ScoreResult) -> dict[str, Any]:
    """The row of an image."""
    row = {"path": path, "bpd": result.bpd, **result.bpd_parts}
    if result.p_value is not None:
        row |= {"ood_score": result.ood_score, "p_value": result.p_value, "ood": result.ood}
    if result.calibration is not None:
        row["calibration"] = f"{result.calibration.name}@{result.calibration.version}"
    if result.notes:
        row["notes"] = "; ".join(result.notes)
    return {**row, "decision": result.decision, "decision_reason": result.decision_reason}


def failed_row(path: str, code: str, message: str) -> dict[str, Any]:
    """The row of a file that cannot be scored.

    Args:
        path: of the file.
        code: of the error.
        message: of the error, which becomes the note.
    """
    return {
        "path": path,
        "error": code,
        "notes": message,
        "decision": "no_verdict",
        "decision_reason": f"{NOT_SCORED}: {code}",
    }
