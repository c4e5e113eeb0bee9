"""Budget, device and logging cadence of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from training.device import DEVICES
from training.runs import RunError

PRECISIONS = ("auto", "float32", "bfloat16")
NO_LIMIT = 10**12  # of training images


@dataclass(frozen=True)
class RunOptions:
    """Budget, device and logging cadence of a run.

    Attributes:
        images: training images to see, over all processes.
        minutes: training time, which becomes a number of images when the run starts; ``None`` for
            no limit.
        seed: of weights, order and noise.
        device: one of :data:`training.device.DEVICES`.
        precision: of the networks, one of :data:`PRECISIONS`; log-densities are always float32.
        checkpoint_minutes: minutes between checkpoints.
        checkpoint_steps: steps after which a checkpoint is written earlier.
        evaluate_steps: steps between evaluations of held-out images and samples.
    """

    images: int
    minutes: float | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 1000
    evaluate_steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("images", "checkpoint_steps", "evaluate_steps"):
            if getattr(self, name) < 1:
                raise RunError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("minutes", "checkpoint_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RunError(f"{name} must be above 0 and finite, got {value:g}")
        for name, known in (("device", DEVICES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise RunError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if not 0 <= self.seed < 2**63:
            raise RunError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
