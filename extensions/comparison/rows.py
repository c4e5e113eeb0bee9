"""What the report reads from the rows of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from extensions.comparison.measure import EFFICIENTNET, INCEPTION, RESNET20

SPACES = {RESNET20: "Fréchet ResNet-20", EFFICIENTNET: "Fréchet EfficientNet", INCEPTION: "FID 50k"}


def row_label(row: dict[str, Any]) -> str:
    """The system, with the seed unless it is 0."""
    recipe: str = row["config"].recipe
    return f"{recipe} (seed {row['seed']})" if row["seed"] else recipe


def figures_of(row: dict[str, Any]) -> dict[str, float | None]:
    """Bits per dimension and the Fréchet distances of mean samples; ``None`` if not measured."""
    measured = row["measured"] or {}
    mean = measured.get("distances", {}).get("mean", {})
    return {
        "bpd": measured.get("elbo", {}).get("bpd"),
        **{space: mean.get(space, {}).get("frechet") for space in (RESNET20, EFFICIENTNET)},
        INCEPTION: measured.get("inception", {}).get("fid", {}).get("50000", {}).get("fid"),
    }


def used_spaces(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The feature spaces in which a distance was measured."""
    return [space for space in SPACES if any(figures_of(row)[space] is not None for row in rows)]


def number_text(value: float | None, digits: int = 2) -> str:
    """A number as it is printed, a dash for none."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def images_seen(row: dict[str, Any]) -> int:
    """Number of images that the system was trained on."""
    return int((row["state"] or {}).get("images", 0))


def learned(row: dict[str, Any]) -> int:
    """Number of images that the system was trained on, without those for the inference network."""
    return images_seen(row) - for_inference(row)


def for_inference(row: dict[str, Any]) -> int:
    """Number of images that the inference network of a frozen generator was trained on."""
    state = row["state"] or {}
    since = state.get("inferring_since")
    return 0 if since is None else int((state["step"] - since) * row["config"].batch_size)
