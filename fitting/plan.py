"""The plan of a fitting: what to train and for how long, from a machine and a budget."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

REST_SHARE = 0.2  # of the budget, for reading, exporting, calibrating and the report
MIN_REST_MINUTES = 0.5
# Below it, likelihood alone makes the better gate, and nothing makes good samples.
ADVERSARIAL_FROM_MINUTES = 60.0
LIKELIHOOD_SHARE = 0.35  # of the training time, before the adversarial stage
SMALL_FROM_MINUTES = 360.0
_MINUTES = {"m": 1.0, "h": 60.0, "d": 1440.0, "": 1.0}


class PlanError(ValueError):
    """The plan cannot be made or resumed."""


@dataclass(frozen=True)
class Stage:
    """One training run; each but the first starts from the weights of the run before it."""

    recipe: str
    minutes: float


@dataclass(frozen=True)
class Plan:
    """What a fitting does. It is decided once: a fitting that is resumed keeps its plan.

    Attributes:
        folder: absolute path of the images' folder.
        name: of the model.
        image_size: height and width of the model's images, pixels.
        size: of the networks, one of :data:`training.recipes.SIZES`.
        device: ``cpu`` or ``cuda``.
        budget: minutes for the whole fitting.
        stages: training runs, in order.
        licence: of the weights, for the bundle; plans that differ in it alone are equal.
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
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """Rebuild from :meth:`to_dict`."""
        return cls(**{**values, "stages": tuple(Stage(**stage) for stage in values["stages"])})

    def check_resumes(self, begun: Plan) -> None:
        """Check that this plan continues one that a fitting was begun with.

        Raises:
            PlanError: it differs; the message says in what.
        """
        before, now = begun._inputs(), self._inputs()
        different = [name for name in now if before[name] != now[name]]
        if different:
            raise PlanError(
                f"the fitting was begun with {', '.join(before[name] for name in different)}; "
                f"it cannot be resumed with {', '.join(now[name] for name in different)}"
            )
        if begun != self:
            raise PlanError(
                "the fitting was begun by another version of this program, which trains "
                f"{begun._training()}; this version would train {self._training()}: "
                "finish it with the version that began it"
            )

    def _inputs(self) -> dict[str, str]:
        """What the user chose, in words."""
        return {
            "folder": f"the images of {self.folder}",
            "budget": f"a budget of {self.budget:g} minutes",
            "image_size": f"images of {self.image_size} pixels",
            "device": f"the device {self.device}",
        }

    def _training(self) -> str:
        """The stages and the size of their networks, in words."""
        stages = " then ".join(f"{stage.recipe} ({stage.minutes:.3g} min)" for stage in self.stages)
        return f"{stages} at size {self.size}"


def read_budget(text: str) -> float:
    """Read a time such as ``20m``, ``1.5h``, ``2d`` or ``90``, which is in minutes.

    Returns:
        Minutes.

    Raises:
        PlanError: the text is not such a time, or is zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd]?)", text.strip())
    if not found or float(found[1]) <= 0:
        raise PlanError(f"a budget must be a time such as 20m, 2h or 1d, got {text!r}")
    return float(found[1]) * _MINUTES[found[2]]


def make_plan(
    folder: str, name: str, image_size: int, budget: float, on_gpu: bool, licence: str | None = None
) -> Plan:
    """Decide what to train.

    A gate needs the likelihood; good samples need an adversarial stage as well, and time.

    Args:
        folder: absolute path of the images' folder.
        name: of the model.
        image_size: height and width of the model's images, pixels.
        budget: minutes for the whole fitting.
        on_gpu: whether it is trained on a GPU.
        licence: of the weights, for the bundle.

    Raises:
        PlanError: the budget is too small.
    """
    training = budget - max(MIN_REST_MINUTES, REST_SHARE * budget)
    if training <= 0:
        raise PlanError(
            f"a budget must be above {MIN_REST_MINUTES:g} minutes, got {budget:g}: it is too small"
        )
    stages: tuple[Stage, ...] = (Stage("v-ade", training),)
    if budget >= ADVERSARIAL_FROM_MINUTES or on_gpu:
        stages = (
            Stage("v-ade", LIKELIHOOD_SHARE * training),
            Stage("av-ade-pd", (1 - LIKELIHOOD_SHARE) * training),
        )
    size = "small" if on_gpu or budget >= SMALL_FROM_MINUTES else "tiny"
    device = "cuda" if on_gpu else "cpu"
    return Plan(folder, name, image_size, size, device, budget, stages, licence)
