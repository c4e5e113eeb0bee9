"""The plan of a fitting: what to train and for how long, from a machine and a budget."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ade_base.errors import UserError
from fitting.survey import LARGEST

REST_SHARE = 0.2  # of the budget, for reading, exporting, calibrating and the report
MIN_REST_MINUTES = 0.5
MOST_REST_MINUTES = 60.0  # these steps look at a bounded number of images
# On two cores these steps take about 2 minutes. Smaller budgets are exceeded, but not refused.
REST_MINUTES = 1.5
# With less there is no time for an adversary.
ADVERSARIAL_FROM_MINUTES = 20.0
LIKELIHOOD_SHARE = 0.35  # of the training time, before the adversarial stage
LEAST_LIKELIHOOD_MINUTES = 11.0  # on a CPU
SMALL_FROM_MINUTES = 360.0
# A guide needs class folders with enough images, and time (docs/explanation/trials.md).
GUIDE_SHARE = 0.2  # of the training time
GUIDE_FROM_IMAGES = 2000
GUIDE_FROM_MINUTES = 4.0
GUIDE_MOST_MINUTES = 15.0
# Scales, couplings and width of the flow, and width of the dequantiser if any, at each size: more
# than the sizes' own, which are for comparing systems. In the same time the likelihood gets better:
# docs/explanation/trials.md. In the minutes of size tiny a dequantiser gains nothing.
FLOWS = {"tiny": (2, 6, 48), "small": (2, 8, 48, 32)}
# Without these terms such a flow leaves the latents unused.
LATENTS = {"free_bits": 8.0, "reconstruction_weight": 8.0}
OPTIMIZER = "muon"
# Of the first stage at size tiny, whose minutes give few steps: twice as many for the same images.
FIRST_BATCH_SIZE = 16
_MINUTES = {"m": 1.0, "h": 60.0, "d": 1440.0, "": 1.0}


class PlanError(UserError, ValueError):
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
        images: number of image files.
        has_classes: whether they lie in class folders.
        guide_minutes: of training the guide of the adversarial stage (:mod:`training.guide`), a
            small encoder; 0 without one.
        flow: scales, couplings and width of the flow, and width of the dequantiser if there is one.
    """

    folder: str
    name: str
    image_size: int
    size: str
    device: str
    budget: float
    stages: tuple[Stage, ...]
    licence: str | None = field(compare=False)
    images: int
    has_classes: bool
    guide_minutes: float
    flow: tuple[int, ...]

    @property
    def rest(self) -> float:
        """Minutes for the steps before and after training."""
        return self.budget - sum(stage.minutes for stage in self.stages) - self.guide_minutes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """Rebuild from :meth:`to_dict`."""
        stages = tuple(Stage(**stage) for stage in values["stages"])
        return cls(**{**values, "stages": stages, "flow": tuple(values["flow"])})

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

    def changes(self, stage: Stage) -> dict[str, Any]:
        """Arguments of :func:`training.recipes.recipe`: what differs from the size's recipes."""
        names = ("flow_scales", "flow_couplings", "flow_width", "dequantizer_width")
        changes = {**dict(zip(names, self.flow, strict=False)), **LATENTS, "optimizer": OPTIMIZER}
        if self.size == "tiny" and stage is self.stages[0]:
            changes["batch_size"] = FIRST_BATCH_SIZE
        return changes

    def without_guide(self) -> Plan:
        """The plan if there is no guide: its minutes go to the stage that it would have helped."""
        *before, last = self.stages
        last = replace(last, minutes=last.minutes + self.guide_minutes)
        return replace(self, stages=(*before, last), guide_minutes=0.0)

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
        """The stages and the size of their networks, in words."""
        stages = " then ".join(f"{stage.recipe} ({stage.minutes:.3g} min)" for stage in self.stages)
        guide = f", and a guide ({self.guide_minutes:.3g} min)" if self.guide_minutes else ""
        flow = f" with a flow of {' x '.join(map(str, self.flow[:3]))}"
        if len(self.flow) > 3:
            flow += f" and a dequantiser of width {self.flow[3]}"
        return f"{stages} at size {self.size}{flow}{guide}"


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

    A gate needs the likelihood; good samples need an adversarial stage as well, and time. Class
    folders with enough images then also train the generator's guide.

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
    guide = 0.0
    stages: tuple[Stage, ...] = (Stage("v-ade", training),)
    if budget >= ADVERSARIAL_FROM_MINUTES or on_gpu:
        guide = min(GUIDE_SHARE * training, GUIDE_MOST_MINUTES)
        if not has_classes or images < GUIDE_FROM_IMAGES or guide < GUIDE_FROM_MINUTES:
            guide = 0.0
        training -= guide
        likelihood = LIKELIHOOD_SHARE * training
        if not on_gpu:
            likelihood = max(likelihood, LEAST_LIKELIHOOD_MINUTES)
        stages = (Stage("v-ade", likelihood), Stage("av-ade-pd", training - likelihood))
    size = "small" if on_gpu or budget >= SMALL_FROM_MINUTES else "tiny"
    device = "cuda" if on_gpu else "cpu"
    return Plan(
        folder=folder,
        name=name,
        image_size=image_size,
        size=size,
        device=device,
        budget=budget,
        stages=stages,
        licence=licence,
        images=images,
        has_classes=has_classes,
        guide_minutes=guide,
        flow=FLOWS[size],
    )


def minutes_text(value: float) -> str:
    """Minutes for the user: two significant digits, or a whole number."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"
