"""One step of the discriminator and one of the model: the paper's alternation (section 4)."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ade_model.model import ADEModel
from ade_model.quantization import dequantize
from ade_model.vae import Decoder
from training.augment import NUMBERS, augment
from training.discriminator import make_discriminator
from training.losses import (
    coverage_loss,
    discriminator_loss,
    gradient_penalty,
    hinge_discriminator_loss,
    latent_surcharge,
    quality_loss,
)
from training.recipes import TrainConfig

logger = logging.getLogger(__name__)
# A step whose gradient is this many times its running norm is skipped: one outlier among the
# images, clipped or not, was seen to ruin a model within ten steps. When so many on end are
# skipped, it is the model that went wrong: its averaged weights take over, at half the rate and
# with a warm-up, for the rate was too high and Adam's first steps are long. The rate comes back
# over the steps that follow. After that many rescues within an average's memory the run has
# diverged.
SPIKE = 8.0
MAX_SKIPPED_STEPS = 10
MAX_RESCUES = 3
RATE_AFTER_RESCUE = 0.5
RECOVERY_STEPS = 5000
SPIKE_AFTER_STEPS = 50
LAST_RATE = 0.02  # of the full one, at the end of a cooldown


_Network = TypeVar("_Network", bound=nn.Module)


def _to_device(network: _Network, device: torch.device) -> _Network:
    """Channels last: convolutions on the CPU need no reordering then."""
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


class TrainingDiverged(RuntimeError):
    """A loss was not finite, or gradients stayed out of all proportion whatever was tried."""


class _Noise:
    """The random numbers of one step. Each process draws those of the whole batch and keeps its
    share: training on two processes is training on one.
    """

    def __init__(
        self, seed: int, step: int, device: torch.device, rank: int, processes: int
    ) -> None:
        self._generator = torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)
        self._device = device
        self._rank, self._processes = rank, processes

    def uniform(self, n: int, *shape: int) -> Tensor:
        """``(n, *shape)``, on [0, 1)."""
        return self._mine(
            torch.rand(n * self._processes, *shape, generator=self._generator, device=self._device)
        )

    def normal(self, n: int, *shape: int) -> Tensor:
        """``(n, *shape)``, standard normal."""
        return self._mine(
            torch.randn(n * self._processes, *shape, generator=self._generator, device=self._device)
        )

    def _mine(self, values: Tensor) -> Tensor:
        return values.chunk(self._processes)[self._rank]


class Trainer:
    """The model, its opponent, their optimisers and the averaged weights.

    Every random number of a step comes from one generator, seeded by ``(seed, step)``: a run that
    is resumed draws what an uninterrupted one would.

    Args:
        config: how to train.
        device: where.
        autocast: a context for the networks' forward passes.
        average: in place, the mean over processes of a flat vector; identity for one process.
        seed: of weights and of noise.
        rank: of this process.
        processes: how many there are.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        average: Callable[[Tensor], Tensor],
        seed: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.config = config
        self.device = device
        self.autocast = autocast
        self.average = average
        self.seed = seed
        self.rank, self.processes = rank, processes
        torch.manual_seed(seed)
        self.model = _to_device(ADEModel(config.model), device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = self._optimizer(self._parameter_groups())
        self.discriminator: nn.Module | None = None
        self.d_optimizer: torch.optim.Optimizer | None = None
        if config.discriminator is not None:
            self.discriminator = _to_device(
                make_discriminator(
                    config.discriminator, config.model.image_size, config.model.channels
                ),
                device,
            )
            self.d_optimizer = self._optimizer(
                [self._group("d_", list(self.discriminator.parameters()))]
            )
        self.step = 0
        self.spent = 0.0
        self.inferring_since: int | None = None
        self.skipped_in_a_row = {"model": 0, "discriminator": 0}
        self.usual_norm = {"model": 0.0, "discriminator": 0.0}
        self.rescued_at: list[int] = []

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        kinds = {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax}
        return kinds[self.config.optimizer]([group for group in groups if group["params"]])

    def _group(self, prefix: str, parameters: list[nn.Parameter]) -> dict[str, Any]:
        """Parameters for an optimiser, with the rate and betas of that prefix; ``rate`` is the
        highest rate.
        """
        rate, beta1, beta2 = (
            getattr(self.config, prefix + name) for name in ("learning_rate", "beta1", "beta2")
        )
        return {"params": parameters, "lr": rate, "rate": rate, "betas": (beta1, beta2)}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """What the likelihood alone trains, and the generator's path, which an adversary trains
        too.

        The adversary needs short memories and a low rate; at these settings the likelihood learns
        more slowly.
        """
        if self.config.discriminator is None:
            return [self._group("", list(self.model.parameters()))]
        path = set(self.model.decoder.parameters()) - set(self._inference_parameters())
        if self.config.flow_sees_quality:
            path |= set(self.model.flow.parameters())
        return [
            self._group("", [p for p in self.model.parameters() if p not in path]),
            self._group("g_", [p for p in self.model.parameters() if p in path]),
        ]

    def _inference_parameters(self) -> list[nn.Parameter]:
        """Weights of ``q(z | x)``, and sigma: what a mean sample does not depend on.

        Empty for a flow by itself.
        """
        if not isinstance(self.model.decoder, Decoder):
            return []
        modules = [
            *self.model.decoder.inference_modules(),
            *([self.model.encoder] if self.model.encoder else []),
        ]
        return [
            self.model.decoder.log_sigma,
            *(p for module in modules for p in module.parameters()),
        ]

    @property
    def inferring(self) -> bool:
        """Whether the generator is finished and its inference network in training."""
        return self.inferring_since is not None

    @property
    def operations(self) -> tuple[str, ...]:
        """What the model can do by now: a GAN can only sample until its inference network is in
        training.
        """
        return (
            self.config.model.operations
            if self.inferring or not self.config.inference_share
            else ("sample",)
        )

    @property
    def _age(self) -> int:
        """Steps of what is in training now: averages, warm-up and norms begin anew with the
        inference network.
        """
        return self.step - (self.inferring_since or 0)

    @property
    def _kl_weight(self) -> float:
        """Of the KL in what is minimised."""
        return (
            min(1.0, self._age * self.config.batch_size / self.config.kl_warmup)
            if self.config.kl_warmup
            else 1.0
        )

    def begin_inference(self) -> None:
        """From now on train the inference network and sigma alone, around the averaged generator
        (paper, section 5).
        """
        if self.inferring_since is None:
            self.model.load_state_dict(self.ema.state_dict())
            self.usual_norm["model"] = 0.0
            self.inferring_since = self.step
        self.model.requires_grad_(False)
        for parameter in self._inference_parameters():
            parameter.requires_grad_(True)

    def run(self, batches: list[Tensor], spent: float = 0.0) -> dict[str, float]:
        """One iteration: ``d_steps`` discriminator steps, then one joint step of the model.

        Args:
            batches: this process's share, uint8 images ``(N, H, W, C)``: one batch for each
                discriminator step, then the model's.
            spent: fraction of the budget of what is in training that was spent before, for the
                cooldown.

        Returns:
            Losses by name, over all processes; ``bpd`` is L_C and ``kl_0`` the KL of the coarsest
            level in it, both in bits per dimension.

        Raises:
            TrainingDiverged: a loss was not finite, or gradients were not for several steps on end.
        """
        noise = _Noise(self.seed, self.step, self.device, self.rank, self.processes)
        self.spent = spent
        *d_batches, model_batch = batches
        losses: dict[str, float] = {}
        x_fake: Tensor | None = None
        if not self.inferring:
            for i, images in enumerate(d_batches):
                x = self._dequantize(images, noise)
                x_fake = self._generate(len(x), noise, with_graph=i == len(d_batches) - 1)
                losses.update(
                    self._discriminator_step(
                        x, x_fake.detach(), noise, self.step * self.config.d_steps + i
                    )
                )
        losses.update(self._model_step(self._dequantize(model_batch, noise), x_fake, noise))
        if not self.skipped_in_a_row["model"]:
            self._update_ema()
        self.step += 1
        return losses

    def _generate(self, n: int, noise: _Noise, with_graph: bool) -> Tensor:
        """Mean samples. Where the flow is not to learn from L_Q, its weights have no part in their
        graph.
        """
        self.model.flow.requires_grad_(self.config.flow_sees_quality)
        with torch.set_grad_enabled(with_graph), self.autocast():
            x_fake = self.model.sample(self._eps(n, noise))
        self.model.flow.requires_grad_(True)
        return x_fake

    def _reconstruction_error(self, features: Tensor, x: Tensor) -> Tensor:
        """Mean squared error of mean reconstructions, in units of x; the flow's weights have no part
        in its graph, as in that of L_Q.
        """
        self.model.flow.requires_grad_(False)
        with self.autocast():
            made = self.model.flow.inverse(features)
        self.model.flow.requires_grad_(True)
        return (made.float() - x).square().mean()

    def _dequantize(self, images: Tensor, noise: _Noise) -> Tensor:
        x = images.to(self.device).permute(0, 3, 1, 2).float()
        if self.config.flips:
            x = torch.where(noise.uniform(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
        x = dequantize(x, noise.uniform(len(x), *x.shape[1:]))
        return x.contiguous(memory_format=torch.channels_last)

    def _eps(self, n: int, noise: _Noise) -> list[Tensor]:
        return [noise.normal(n, *shape) for shape in self.config.model.latent_shapes]

    def _seen(self, x: Tensor, noise: _Noise) -> Tensor:
        """Images as the discriminator sees them."""
        return augment(x, noise.uniform(len(x), NUMBERS)) if self.config.augment else x

    def _discriminator_step(
        self, x: Tensor, x_fake: Tensor, noise: _Noise, count: int
    ) -> dict[str, float]:
        assert (
            self.discriminator is not None
            and self.d_optimizer is not None
            and self.config.discriminator is not None
        )
        seen = torch.cat([self._seen(x, noise), self._seen(x_fake, noise)])
        with self.autocast():
            logits_real, logits_fake = self.discriminator(seen).chunk(2)
        divergence = (
            hinge_discriminator_loss
            if self.config.discriminator.kind == "projected"
            else discriminator_loss
        )
        loss = divergence(logits_real, logits_fake)
        losses = {
            "d_loss": loss.item(),
            "logit_real": logits_real.mean().item(),
            "logit_fake": logits_fake.mean().item(),
        }
        if self.config.gp_weight and count % self.config.gp_every == 0:
            mix = noise.uniform(len(x), 1, 1, 1)
            penalty = gradient_penalty(
                self.discriminator, mix * x + (1 - mix) * x_fake, self.config.gp_target
            )
            loss = loss + self.config.gp_weight * self.config.gp_every * penalty
            losses["gradient_penalty"] = penalty.item()
        loss.backward()
        return self._apply("discriminator", self.discriminator, self.d_optimizer, losses)

    def _model_step(self, x: Tensor, x_fake: Tensor | None, noise: _Noise) -> dict[str, float]:
        losses: dict[str, float] = {}
        if self.config.coverage or self.inferring:
            with self.autocast():
                evidence, features = self.model.evidence_and_features(x, self._eps(len(x), noise))
            loss = coverage_loss(evidence, self.config.model.num_dims)
            losses["bpd"] = loss.item()
            losses |= {
                f"kl_{level}": (kl.mean() / (self.config.model.num_dims * math.log(2.0))).item()
                for level, kl in enumerate(evidence.kl)
            }
            if self.config.reconstruction_weight:
                error = self._reconstruction_error(features, x)
                losses["reconstruction_error"] = error.item()
                loss = loss + self.config.reconstruction_weight * error
            if self.config.free_bits or self._kl_weight < 1:
                loss = loss + latent_surcharge(
                    evidence,
                    self.config.model.num_dims,
                    self.config.free_bits,
                    self._kl_weight,
                    self.average,
                )
            loss.backward()
        if self.discriminator is not None and x_fake is not None:
            # The samples of the discriminator's last step are judged anew, by its weights of now:
            # the model has not changed since, so their graph gives L_Q's exact gradient and saves a
            # pass through the generator.
            self.discriminator.requires_grad_(False)
            seen = self._seen(x_fake, noise)
            with self.autocast():
                logits_fake = self.discriminator(seen)
            loss = quality_loss(logits_fake)
            losses["quality_loss"] = loss.item()
            (self.config.quality_weight * loss).backward()
            self.discriminator.requires_grad_(True)
        return self._apply("model", self.model, self.optimizer, losses)

    def _apply(
        self,
        name: str,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        losses: dict[str, float],
    ) -> dict[str, float]:
        """Average, check and clip the gradients, and step; returns the losses and the norm before
        clipping.
        """
        gradients = {p: p.grad for p in module.parameters() if p.grad is not None}
        local = torch.tensor(list(losses.values()), device=self.device)
        flat = self.average(
            torch.cat([local, *(gradient.flatten() for gradient in gradients.values())])
        )
        losses = dict(zip(losses, flat[: len(local)].tolist(), strict=True))
        flat = flat[len(local) :]
        bad = {key: value for key, value in losses.items() if not math.isfinite(value)}
        if bad:
            raise TrainingDiverged(f"step {self.step}: not finite: {bad}")
        norm = flat.norm().item()
        usual = self.usual_norm[name]
        # The discriminator must answer when the model has found a weakness: its large gradients are
        # no outliers.
        in_proportion = (
            module is self.discriminator
            or self._age < SPIKE_AFTER_STEPS
            or usual == 0
            or norm < SPIKE * usual
        )
        if math.isfinite(norm) and in_proportion:
            # Adam takes no notice of a gradient's usual scale, but an outlier would move weights
            # far at once and then, in the mean of squares, make the following steps short.
            kept = min(norm, self.config.clip * usual) if usual else norm
            flat *= kept / (norm + 1e-12)
            offset = 0
            for p in gradients:
                p.grad = flat[offset : offset + p.numel()].view(p.shape)
                offset += p.numel()
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * self._rate_share(name)
            optimizer.step()
            self.usual_norm[name] = kept if usual == 0 else 0.95 * usual + 0.05 * kept
            self.skipped_in_a_row[name] = 0
        else:
            self.skipped_in_a_row[name] += 1
            if self.skipped_in_a_row[name] >= MAX_SKIPPED_STEPS:
                self._rescue(
                    name,
                    f"{MAX_SKIPPED_STEPS} steps on end had gradients that were not finite or over {SPIKE:g} "
                    f"times the usual norm ({norm:.3g}, usual {usual:.3g})",
                )
        optimizer.zero_grad(set_to_none=True)
        return losses | {"d_grad_norm" if module is self.discriminator else "grad_norm": norm}

    def _rate_share(self, name: str) -> float:
        """How much of the highest rates is used: less while warming up, near the budget's end, and,
        of the model's, after a rescue.
        """
        rescues = [
            step
            for step in self.rescued_at
            if name == "model" and step >= (self.inferring_since or 0)
        ]
        age = min([self._age, *(self.step - step for step in rescues[-1:])])
        share = min(1.0, (age + 1) / max(1, self.config.warmup_steps))
        for step in rescues:
            share *= RATE_AFTER_RESCUE ** max(0.0, 1 - (self.step - step) / RECOVERY_STEPS)
        if self.spent > 1 - self.config.cooldown:
            share *= LAST_RATE + (1 - LAST_RATE) * max(0.0, 1 - self.spent) / self.config.cooldown
        return share

    def _rescue(self, name: str, why: str) -> None:
        """Go back to the averaged weights, with a fresh optimiser and half the rate."""
        memory = round(1 / (1 - self.config.ema_decay))
        self.rescued_at.append(self.step)
        if (
            name != "model"
            or sum(self.step - step < memory for step in self.rescued_at) > MAX_RESCUES
        ):
            raise TrainingDiverged(f"step {self.step}: {why}")
        logger.warning(
            "step %d: %s; going on from the averaged weights at half the rate", self.step, why
        )
        self.model.load_state_dict(self.ema.state_dict())
        self.optimizer.state.clear()
        self.skipped_in_a_row[name] = 0

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, (1 + self._age) / (10 + self._age))
        pairs = list(zip(self.ema.parameters(), self.model.parameters(), strict=True))
        torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)
