"""The phases of a run, in steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from training.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Steps of a run's phases, which depend on its configuration and budget alone.

    Attributes:
        likelihood: first steps, in which the likelihood alone trains.
        total: steps of the whole run but for a GAN's inference network.
        inference: steps of a GAN's inference network, after those.
    """

    likelihood: int
    total: int
    inference: int

    def is_done(self, step: int, inferring_since: int | None) -> bool:
        """Whether a run that has made a number of steps is finished."""
        if not self.inference:
            return step >= self.total
        return inferring_since is not None and step >= inferring_since + self.inference

    def spent(self, step: int, inferring_since: int | None) -> float:
        """Fraction of the steps made, or of those of the inference network once it is trained."""
        if inferring_since is not None:
            return (step - inferring_since) / self.inference
        return step / self.total


def schedule_of(config: TrainConfig, images: int, joint_since: int | None = None) -> Schedule:
    """The schedule of a run that sees a number of training images.

    Args:
        config: of the run.
        images: the budget; those that discriminators alone see do not count.
        joint_since: step after which the adversary took part; ``None`` before that.
    """
    likelihood = round(config.likelihood_share * images / config.first_batch_size)
    if joint_since is not None:  # the budget may have been changed since then
        likelihood = joint_since
    joint = math.ceil(
        max(0, images - likelihood * config.first_batch_size) / config.joint_batch_size
    )
    total = max(1, likelihood + joint)
    inference = math.ceil(round(config.inference_share * images) / config.batch_size)
    return Schedule(likelihood, total, inference)


def images_in(config: TrainConfig, seconds: float, likelihood: float, joint: float) -> int:
    """Training images that can be seen within a time.

    Args:
        config: of the run.
        seconds: for the whole run but for a GAN's inference network.
        likelihood: seconds per image in the steps of the likelihood alone.
        joint: seconds per image in the others.
    """
    share = config.likelihood_share
    return max(config.joint_batch_size, round(seconds / (share * likelihood + (1 - share) * joint)))
