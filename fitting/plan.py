"""What to train for how long, from a machine and a budget."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

FOR_THE_REST = 0.2  # of the budget: reading, exporting, calibrating, the report
LEAST_FOR_THE_REST_MIN = 0.5
ADVERSARIAL_FROM_MIN = (
    60.0  # below, likelihood alone makes the better gate, and nothing makes good samples
)
LIKELIHOOD_SHARE = 0.35  # of the training time, before the adversary comes in
SMALL_FROM_MIN = 360.0
_UNITS = {"m": 1.0, "h": 60.0, "d": 1440.0, "": 1.0}


class PlanError(ValueError):
    """A budget that is none."""


@dataclass(frozen=True)
class Stage:
    """One training run; later ones start from the weights of the one before."""

    recipe: str
    minutes: float


@dataclass(frozen=True)
class Plan:
    """What a fitting does, once decided: a later call goes on with the same.

    Attributes:
        folder: of the images, resolved.
        name: of the model.
        image_size: pixels a side.
        size: of the networks.
        device: ``cpu`` or ``cuda``.
        budget: minutes in all.
        stages: training runs.
        licence: of the weights, for the bundle; another one is no other plan.
    """

    folder: str
    name: str
    image_size: int
    size: str
    device: str
    budget: float
    stages: tuple[Stage, ...]
    licence: str | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        return cls(**{**values, "stages": tuple(Stage(**stage) for stage in values["stages"])})


def read_budget(text: str) -> float:
    """Minutes of ``20m``, ``1.5h``, ``2d`` or ``90``.

    Raises:
        PlanError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd]?)", text.strip())
    if not found or float(found[1]) <= 0:
        raise PlanError(f"a budget is a time such as 20m, 2h or 1d, got {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def make_plan(
    folder: str, name: str, image_size: int, budget: float, on_gpu: bool, licence: str | None = None
) -> Plan:
    """Decide: a gate needs the likelihood, good samples the adversary and time.

    Args:
        folder: of the images.
        name: of the model.
        image_size: pixels a side.
        budget: minutes in all.
        on_gpu: whether there is one.
        licence: of the weights, for the bundle.
    """
    training = budget - max(LEAST_FOR_THE_REST_MIN, FOR_THE_REST * budget)
    if training <= 0:
        raise PlanError(f"{budget:g} minutes are too few: {2 * LEAST_FOR_THE_REST_MIN:g} at least")
    stages: tuple[Stage, ...] = (Stage("v-ade", training),)
    if budget >= ADVERSARIAL_FROM_MIN or on_gpu:
        stages = (
            Stage("v-ade", LIKELIHOOD_SHARE * training),
            Stage("av-ade-pd", (1 - LIKELIHOOD_SHARE) * training),
        )
    size = "small" if on_gpu or budget >= SMALL_FROM_MIN else "tiny"
    return Plan(
        folder, name, image_size, size, "cuda" if on_gpu else "cpu", budget, stages, licence
    )
