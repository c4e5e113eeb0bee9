"""The number of weights of a system."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ade_model.model import ADEModel
from training.config import TrainConfig
from training.discriminator import make_discriminator


@dataclass(frozen=True)
class WeightCounts:
    """Trained weights of the model, of its flow, which is part of it, and of discriminators."""

    model: int
    flow: int
    discriminator: int

    @property
    def flow_share(self) -> float:
        """The flow's share of the model's weights; in the paper, ``f`` adds about 1.4 %."""
        return self.flow / self.model


def count_weights(config: TrainConfig) -> WeightCounts:
    """Count the weights of a configured system, without allocating them."""
    with torch.device("meta"):
        model = ADEModel(config.model)
        discriminators = [
            make_discriminator(its, config.model.image_size, config.model.channels)
            for its in (config.discriminator, config.pixel_discriminator)
            if its is not None
        ]
    return WeightCounts(_count(model), _count(model.flow), sum(map(_count, discriminators)))


def _count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
