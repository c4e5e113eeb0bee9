"""The one recipe: how the shipped model and the models of ``ade fit`` are trained.

A run has three phases, all in one schedule (:mod:`training.schedule`). First the likelihood alone
trains all weights, at a high rate: its steps are cheap, and an adversary that meets a random
generator makes its samples collapse. Then the adversary takes part, and its weight and rate grow
from zero. In the last part all rates fall. The reasons are in
docs/explanation/how-a-model-is-trained.md.
"""

from __future__ import annotations

from typing import Any

LINE = "the shipped model's: likelihood, then also two discriminators (not in the paper)"
LINE_PROJECTED = "flagship with the projected discriminator alone, for comparison"

# Of the networks, at each size: a larger flow than that of the systems to compare. At size tiny a
# dequantiser gains nothing in the minutes that there are.
MODEL: dict[str, dict[str, Any]] = {
    "tiny": {"flow_scales": 2, "flow_couplings": 6, "flow_width": 48},
    "small": {
        "latent_channels": (32, 32, 16),
        "latent_groups": 2,
        "flow_scales": 3,
        "flow_couplings": 8,
        "flow_width": 64,
        "dequantizer_width": 48,
    },
    "paper": {"latent_groups": 2, "dequantizer_width": 48},
}
# Of likelihood alone; with discriminators: generated, and those whose likelihood is trained. With
# fewer images per step, the same minutes have more steps.
BATCH_SIZES = {"tiny": (16, 32, 16), "small": (32, 48, 16), "paper": (64, 64, 32)}
GP_WEIGHT = 0.5  # of the discriminator of pixels
TRAINING: dict[str, Any] = {
    "optimizer": "muon",
    "likelihood_share": 0.5,
    "likelihood_learning_rate": 2e-3,
    "learning_rate": 1e-3,
    "g_learning_rate": 3e-4,
    "d_learning_rate": 4e-4,
    "d_beta1": 0.0,
    "augment": True,
    "warmup_steps": 300,
    "alone_steps": 400,
    # Without these two, a strong flow leaves the latents unused.
    "free_bits": 8.0,
    "reconstruction_weight": 6.0,
    "noisy_share": 0.5,
}


def training_of(size: str) -> dict[str, Any]:
    """Fields of :class:`training.config.TrainConfig` at a size of the networks."""
    names = ("likelihood_batch_size", "batch_size", "coverage_batch_size")
    return {**TRAINING, **dict(zip(names, BATCH_SIZES[size], strict=True))}


# What a budget allows. With less there is no time for an adversary.
ADVERSARIAL_FROM_MINUTES = 16.0
SMALL_FROM_MINUTES = 300.0
LEAST_LIKELIHOOD_MINUTES = 11.0  # on a CPU
LIKELIHOOD_OF_TIME = 0.35
JOINT_COST = 3.0  # time of an image in a joint step, in those of one in a step of likelihood alone


def alone(size: str) -> dict[str, Any]:
    """Changes to the recipe ``v-ade`` that train as the first phase does, without an adversary."""
    names = ("optimizer", "warmup_steps", "free_bits", "reconstruction_weight")
    return {
        **MODEL[size],
        **{name: TRAINING[name] for name in names},
        "learning_rate": TRAINING["likelihood_learning_rate"],
        "batch_size": BATCH_SIZES[size][0],
    }


def choose(minutes: float, on_gpu: bool) -> tuple[str, str, dict[str, Any]]:
    """Choose what to train in a time.

    Args:
        minutes: of training.
        on_gpu: whether it is trained on a GPU.

    Returns:
        A recipe, the size of its networks, and the changes to it, as
        :func:`training.recipes.recipe` takes them.
    """
    size = "small" if on_gpu or minutes >= SMALL_FROM_MINUTES else "tiny"
    if minutes < ADVERSARIAL_FROM_MINUTES and not on_gpu:
        return "v-ade", size, alone(size)
    of_time = LIKELIHOOD_OF_TIME
    if not on_gpu:
        of_time = max(of_time, LEAST_LIKELIHOOD_MINUTES / minutes)
    # The share is one of images, of which the first phase sees more in the same time.
    seen = of_time * JOINT_COST
    return "flagship", size, {"likelihood_share": round(seen / (seen + 1 - of_time), 3)}
