"""The one recipe: how the shipped model and the models of ``ade fit`` are trained.

A run has three phases, all in one schedule (:mod:`training.schedule`). First the likelihood alone
trains all weights, at a high rate: its steps are cheap, and an adversary that meets a random
generator makes its samples collapse. Then the adversary takes part, and its weight and rate grow
from zero. In the last part all rates fall. The reasons are in
docs/explanation/how-a-model-is-trained.md.
"""

from __future__ import annotations

from typing import Any

LINE = "the shipped model's: likelihood, then also a projected discriminator (not in the paper)"

# Of the networks, at each size: a larger flow than that of the systems to compare. At size tiny a
# dequantiser gains nothing in the minutes that there are.
MODEL: dict[str, dict[str, Any]] = {
    "tiny": {"flow_scales": 2, "flow_couplings": 6, "flow_width": 48},
    "small": {
        "latent_channels": (32, 32, 16),
        "flow_scales": 3,
        "flow_couplings": 8,
        "flow_width": 64,
        "dequantizer_width": 48,
    },
    "paper": {"dequantizer_width": 48},
}
# With fewer images per step, the same minutes have more steps.
BATCH_SIZES = {"tiny": (16, 32), "small": (32, 48), "paper": (64, 64)}
TRAINING: dict[str, Any] = {
    "optimizer": "muon",
    "likelihood_share": 0.4,
    "likelihood_learning_rate": 2e-3,
    "learning_rate": 1e-3,
    "g_learning_rate": 3e-4,
    "d_learning_rate": 4e-4,
    "d_beta1": 0.0,
    "gp_weight": 0.0,
    "augment": True,
    "warmup_steps": 300,
    # Without these two, a strong flow leaves the latents unused.
    "free_bits": 8.0,
    "reconstruction_weight": 6.0,
    "noisy_share": 0.5,
}


def training_of(size: str) -> dict[str, Any]:
    """Fields of :class:`training.recipes.TrainConfig` at a size of the networks."""
    first, batch_size = BATCH_SIZES[size]
    return {**TRAINING, "likelihood_batch_size": first, "batch_size": batch_size}
