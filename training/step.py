"""One step of the discriminator and one of the model: the paper's alternation (section 4)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ade_model.model import ADEModel
from ade_model.quantization import dequantize
from training.discriminator import Discriminator
from training.losses import coverage_loss, discriminator_loss, gradient_penalty, quality_loss
from training.recipes import TrainConfig

MAX_SKIPPED_STEPS = 20
# A step whose gradient is this many times its running norm is skipped: one outlier among the images, clipped or
# not, was seen to ruin a model within ten steps.
SPIKE = 8.0
SPIKE_AFTER_STEPS = 50


_Network = TypeVar("_Network", bound=nn.Module)


def _to_device(network: _Network, device: torch.device) -> _Network:
    """Channels last: convolutions on the CPU need no reordering then."""
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


class TrainingDiverged(RuntimeError):
    """A loss was not finite, or too many gradients in a row were not finite or out of all proportion."""


class Trainer:
    """The model, its opponent, their optimisers and the averaged weights.

    Every random number of a step comes from one generator, seeded by ``(seed, step, rank)``: a run
    that is resumed draws what an uninterrupted one would.

    Args:
        config: how to train.
        device: where.
        autocast: a context for the networks' forward passes.
        average: in place, the mean over processes of a flat gradient vector; identity for one process.
        seed: of weights and of noise.
    """

    def __init__(self, config: TrainConfig, device: torch.device, autocast: Callable[[], AbstractContextManager],
                 average: Callable[[Tensor], Tensor], seed: int) -> None:
        self.config = config
        self.device = device
        self.autocast = autocast
        self.average = average
        self.seed = seed
        torch.manual_seed(seed)
        self.model = _to_device(ADEModel(config.model), device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), config.learning_rate, betas=(config.beta1, 0.999))
        self.discriminator: Discriminator | None = None
        self.d_optimizer: torch.optim.Adam | None = None
        if config.discriminator is not None:
            self.discriminator = _to_device(Discriminator(
                config.discriminator, config.model.image_size, config.model.channels), device)
            self.d_optimizer = torch.optim.Adam(
                self.discriminator.parameters(), config.d_learning_rate, betas=(0.5, 0.99))
        self.step = 0
        self.skipped_in_a_row = {"model": 0, "discriminator": 0}
        self.usual_norm = {"model": 0.0, "discriminator": 0.0}

    def run(self, batches: list[Tensor], rank: int = 0) -> dict[str, float]:
        """One iteration: ``d_steps`` discriminator steps, then one joint step of the model.

        Args:
            batches: uint8 images ``(N, H, W, C)``: one batch for each discriminator step, then the model's.
            rank: of this process.

        Returns:
            Losses by name; ``bpd`` is L_C.

        Raises:
            TrainingDiverged: a loss was not finite, or gradients were not for several steps on end.
        """
        noise = torch.Generator(self.device).manual_seed(((self.seed * 1_000_003 + self.step) * 4096 + rank) % 2**63)
        *d_batches, model_batch = [self._dequantize(images, noise) for images in batches]
        losses: dict[str, float] = {}
        for i, x in enumerate(d_batches):
            losses.update(self._discriminator_step(x, noise, self.step * self.config.d_steps + i))
        losses.update(self._model_step(model_batch, noise))
        self._update_ema()
        self.step += 1
        return losses

    def _dequantize(self, images: Tensor, noise: torch.Generator) -> Tensor:
        x = images.to(self.device).permute(0, 3, 1, 2).float()
        if self.config.flips:
            mirrored = torch.rand(len(x), 1, 1, 1, generator=noise, device=self.device) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        x = dequantize(x, torch.rand(x.shape, generator=noise, device=self.device))
        return x.contiguous(memory_format=torch.channels_last)

    def _eps(self, n: int, noise: torch.Generator) -> list[Tensor]:
        return [torch.randn(n, *shape, generator=noise, device=self.device)
                for shape in self.config.model.latent_shapes]

    def _discriminator_step(self, x: Tensor, noise: torch.Generator, count: int) -> dict[str, float]:
        assert self.discriminator is not None and self.d_optimizer is not None
        with torch.no_grad(), self.autocast():
            x_fake = self.model.sample(self._eps(len(x), noise))
        with self.autocast():
            logits_real, logits_fake = self.discriminator(torch.cat([x, x_fake])).chunk(2)
        loss = discriminator_loss(logits_real, logits_fake)
        losses = {"d_loss": loss.item(), "logit_real": logits_real.mean().item(),
                  "logit_fake": logits_fake.mean().item()}
        if count % self.config.gp_every == 0:
            mix = torch.rand(len(x), 1, 1, 1, generator=noise, device=self.device)
            penalty = gradient_penalty(self.discriminator, mix * x + (1 - mix) * x_fake, self.config.gp_target)
            loss = loss + self.config.gp_weight * self.config.gp_every * penalty
            losses["gradient_penalty"] = penalty.item()
        loss.backward()
        losses["d_grad_norm"] = self._apply("discriminator", self.discriminator, self.d_optimizer, losses,
                                            self.config.d_learning_rate)
        return losses

    def _model_step(self, x: Tensor, noise: torch.Generator) -> dict[str, float]:
        with self.autocast():
            evidence = self.model.evidence(x, self._eps(len(x), noise))
        loss = coverage_loss(evidence, self.config.model.num_dims)
        losses = {"bpd": loss.item()}
        loss.backward()
        if self.discriminator is not None:
            # L_C and L_Q are two backward passes of one joint step: the flow's weights sit the second one out.
            self.model.flow.requires_grad_(self.config.flow_sees_quality)
            self.discriminator.requires_grad_(False)
            with self.autocast():
                logits_fake = self.discriminator(self.model.sample(self._eps(len(x), noise)))
            loss = quality_loss(logits_fake)
            losses["quality_loss"] = loss.item()
            (self.config.quality_weight * loss).backward()
            self.model.flow.requires_grad_(True)
            self.discriminator.requires_grad_(True)
        losses["grad_norm"] = self._apply("model", self.model, self.optimizer, losses, self.config.learning_rate)
        return losses

    def _apply(self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer, losses: dict[str, float],
               learning_rate: float) -> float:
        """Average, check and clip the gradients, and step; returns their norm before clipping."""
        bad = {key: value for key, value in losses.items() if not math.isfinite(value)}
        if bad:
            raise TrainingDiverged(f"step {self.step}: not finite: {bad}")
        gradients = {p: p.grad for p in module.parameters() if p.grad is not None}
        flat = self.average(torch.cat([gradient.flatten() for gradient in gradients.values()]))
        norm = flat.norm().item()
        usual = self.usual_norm[name]
        # The discriminator must answer when the model has found a weakness: its large gradients are no outliers.
        in_proportion = module is self.discriminator or self.step < SPIKE_AFTER_STEPS or norm < SPIKE * usual
        if math.isfinite(norm) and in_proportion:
            flat *= min(1.0, self.config.max_grad_norm / (norm + 1e-12))
            offset = 0
            for p in gradients:
                p.grad = flat[offset:offset + p.numel()].view(p.shape)
                offset += p.numel()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
            optimizer.step()
            self.usual_norm[name] = norm if usual == 0 else 0.95 * usual + 0.05 * norm
            self.skipped_in_a_row[name] = 0
        else:
            self.skipped_in_a_row[name] += 1
            if self.skipped_in_a_row[name] >= MAX_SKIPPED_STEPS:
                raise TrainingDiverged(
                    f"step {self.step}: {MAX_SKIPPED_STEPS} steps on end had gradients that were not finite or over "
                    f"{SPIKE:g} times the usual norm ({norm:.3g}, usual {usual:.3g})")
        optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        pairs = list(zip(self.ema.parameters(), self.model.parameters(), strict=True))
        torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)
