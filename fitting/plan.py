"""The plan of a fitting: what to train and for how long, from a machine and a budget."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ade_base.errors import UserError
from fitting.survey import LARGEST
from training.config import TrainConfig
from training.data import CHANNELS
from training.flagship import choose
from training.recipes import recipe

REST_SHARE = 0.2  # of the budget, for reading, exporting, calibrating and the report
MIN_REST_MINUTES = 0.5
MOST_REST_MINUTES = 60.0  # these steps look at a bounded number of images
# On two cores these steps take about 2 minutes. Smaller budgets are exceeded, but not refused.
REST_MINUTES = 1.5
_MINUTES = {"m": 1.0, "h": 60.0, "d": 1440.0, "": 1.0}


class PlanError(UserError, ValueError):
    """The plan cannot be made or resumed."""


@dataclass(frozen=True)
class Plan:
    """What a fitting does. It is decided once: a fitting that is resumed keeps its plan.

    Attributes:
        folder: absolute path of the images' folder.
        name: of the model.
        image_size: height and width of the model's images, pixels.
        device: ``cpu`` or ``cuda``.
        budget: minutes for the whole fitting.
        minutes: of training.
        recipe: what is trained, of :mod:`training.recipes`.
        size: of the networks, one of :data:`training.config.SIZES`.
        changes: to the recipe, as :func:`training.flagship.choose` returns them.
        licence: of the weights, for the bundle; plans that differ in it alone are equal.
        images: number of image files.
        has_classes: whether they lie in class folders.
    """

    folder: str
    name: str
    image_size: int
    device: str
    budget: float
    minutes: float
    recipe: str
    size: str
    changes: dict[str, Any]
    licence: str | None = field(compare=False)
    images: int
    has_classes: bool

    @property
    def rest(self) -> float:
        """Minutes for the steps before and after training."""
        return self.budget - self.minutes

    def config(self) -> TrainConfig:
        """What is trained and how.

        Raises:
            ConfigError: the image size does not suit the networks.
        """
        return recipe(self.recipe, self.image_size, CHANNELS, self.size, **self.changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """Rebuild from :meth:`to_dict`."""
        return cls(**values)

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a file with :meth:`to_dict`.

        Raises:
            PlanError: it is damaged, or of another version.
        """
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (ValueError, TypeError, KeyError) as error:
            raise PlanError(
                f"{path} is damaged, or of another version of this program ({error}): finish the "
                "fitting with the version that began it"
            ) from error

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
                f"it cannot be resumed with {', '.join(now[name] for name in different)}; "
                f"use the same {' and '.join(name.replace('_', ' ') for name in different)}"
            )
        if begun != self:
            raise PlanError(
                "the fitting was begun by another version of this program, which trains "
                f"{begun._training()}; this version would train {self._training()}: "
                "finish it with the version that began it"
            )

    def _inputs(self) -> dict[str, str]:
        """What the user chose, in words."""
        classes = " in class folders" if self.has_classes else ""
        return {
            "folder": f"the images of {self.folder}",
            "images": f"{self.images} image files{classes}",
            "name": f"the name {self.name}",
            "budget": f"a budget of {self.budget:g} minutes",
            "image_size": f"images of {self.image_size} pixels",
            "device": f"the device {self.device}",
        }

    def _training(self) -> str:
        """The training, in words."""
        changes = ", ".join(f"{name} {value}" for name, value in self.changes.items())
        return f"{self.recipe} at size {self.size} ({changes}) for {self.minutes:.3g} min"


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
    folder: str,
    name: str,
    image_size: int,
    budget: float,
    on_gpu: bool,
    licence: str | None = None,
    images: int = 0,
    has_classes: bool = False,
) -> Plan:
    """Decide what to train.

    A gate needs the likelihood; good samples need an adversary as well, and time.

    Args:
        folder: absolute path of the images' folder.
        name: of the model.
        image_size: height and width of the model's images, pixels.
        budget: minutes for the whole fitting.
        on_gpu: whether it is trained on a GPU.
        licence: of the weights, for the bundle.
        images: number of image files.
        has_classes: whether they lie in class folders.

    Raises:
        PlanError: the budget is too small, or the images are too large.
    """
    if image_size > LARGEST:
        raise PlanError(f"image_size must be at most {LARGEST} pixels, got {image_size}")
    training = budget - max(MIN_REST_MINUTES, min(REST_SHARE * budget, MOST_REST_MINUTES))
    if training <= 0:
        raise PlanError(
            f"a budget must be above {MIN_REST_MINUTES:g} minutes, got {budget:g}: it is too small"
        )
    chosen, size, changes = choose(training, on_gpu)
    # Tuples become lists, as in the file.
    changes = json.loads(json.dumps(changes))
    return Plan(
        folder=folder,
        name=name,
        image_size=image_size,
        device="cuda" if on_gpu else "cpu",
        budget=budget,
        minutes=training,
        recipe=chosen,
        size=size,
        changes=changes,
        licence=licence,
        images=images,
        has_classes=has_classes,
    )


def minutes_text(value: float) -> str:
    """Minutes for the user: two significant digits, or a whole number."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"
