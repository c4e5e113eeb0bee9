"""The adversaries of a model: discriminators, each with its optimiser and its losses.

Two that see different things keep samples more diverse than one (Kumari et al., "Ensembling
Off-the-shelf Models for GAN Training", 2022): a projected one sees objects and neglects variety,
one of pixels sees colours and textures.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor, nn

from training.config import DiscriminatorConfig, TrainConfig
from training.discriminator import make_discriminator
from training.losses import discriminator_loss, gradient_penalty, hinge_discriminator_loss
from training.noise import Noise
from training.optimizers import group_of, make_optimizer

Autocast = Callable[[], AbstractContextManager[object]]
Network = TypeVar("Network", bound=nn.Module)


class Adversary:
    """One discriminator.

    Attributes:
        prefix: of the names of its losses and files; empty for the first one.
        name: ``discriminator`` after the prefix.
        network: the discriminator.
        optimizer: of its weights.
        is_projected: whether its loss is a hinge, without a gradient penalty.
    """

    def __init__(
        self,
        prefix: str,
        discriminator: DiscriminatorConfig,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.prefix, self.name = prefix, f"{prefix}discriminator"
        self.is_projected = discriminator.kind == "projected"
        self.network = to_device(
            make_discriminator(discriminator, config.model.image_size, config.model.channels),
            device,
        )
        self.optimizer = make_optimizer(
            "adam" if config.optimizer == "muon" else config.optimizer,
            [group_of(config, "d_", list(self.network.parameters()))],
        )
        self._config = config

    def loss(
        self,
        x: Tensor,
        shown: Tensor,
        features: list[Tensor],
        noise: Noise,
        step: int,
        autocast: Autocast,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of its own step.

        Args:
            x: real images, ``(N, C, H, W)``, augmented if configured.
            shown: generated images, of the same shape, also augmented.
            features: what the network computes of these before its trained layers.
            noise: of this iteration.
            step: number of the iteration.
            autocast: makes the context of the network's forward pass.

        Returns:
            Scalar, and the losses by name.
        """
        with autocast():  # apart, because a discriminator may compare images within a batch
            logits_real = self.network(x)
            logits_fake = self.network.judge([level.detach() for level in features])
        divergence = hinge_discriminator_loss if self.is_projected else discriminator_loss
        loss = divergence(logits_real, logits_fake)
        losses = {
            "d_loss": loss.item(),
            "logit_real": logits_real.mean().item(),
            "logit_fake": logits_fake.mean().item(),
        }
        config = self._config
        if config.gp_weight and not self.is_projected and step % config.gp_every == 0:
            mix = noise.uniform(len(x), 1, 1, 1)
            between = mix * x + (1 - mix) * shown.detach()
            penalty = gradient_penalty(self.network, between, config.gp_target)
            loss = loss + config.gp_weight * config.gp_every * penalty
            losses["gradient_penalty"] = penalty.item()
        return loss, {f"{self.prefix}{name}": value for name, value in losses.items()}


def to_device(network: Network, device: torch.device) -> Network:
    """Move a network, with channels last, so that CPU convolutions need no reordering."""
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def adversaries_of(config: TrainConfig, device: torch.device) -> list[Adversary]:
    """The adversaries of a configured system, none for likelihood alone."""
    configured = {"": config.discriminator, "pixel_": config.pixel_discriminator}
    return [
        Adversary(prefix, discriminator, config, device)
        for prefix, discriminator in configured.items()
        if discriminator is not None
    ]
