"""The training step: discriminator and model in alternation (paper, section 4)."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ade_base.errors import UserError
from ade_model.model import ADEModel
from ade_model.quantization import dequantize
from training.adversary import adversaries_of, to_device
from training.augment import NUMBERS, augment
from training.config import TrainConfig
from training.losses import coverage_loss, latent_surcharge, quality_loss
from training.noise import Noise
from training.optimizers import (
    groups_of,
    inference_parameters,
    make_optimizer,
    rates,
    set_clipped,
    update_average,
)

logger = logging.getLogger(__name__)
# A step is skipped if its gradient's norm is SPIKE times the running mean: one outlier among the
# images, clipped or not, ruined a model within ten steps. After MAX_SKIPPED_STEPS skipped steps in
# a row the model itself is considered broken and is rescued: the averaged weights replace it, and
# training restarts with a warm-up at RATE_AFTER_RESCUE of the rate, which recovers over
# RECOVERY_STEPS. More than MAX_RESCUES rescues within RESCUES_WITHIN steps, or within the memory of
# the average if that is longer, mean divergence.
SPIKE = 8.0
GROWTH = 4.0  # a norm enters its running mean as at most GROWTH times that mean
NORM_MEMORY, NORM_NEWS = 0.95, 0.05  # shares of the running mean before, and of a step's norm
MAX_SKIPPED_STEPS = 10
MAX_RESCUES = 3
RESCUES_WITHIN = 2000
RATE_AFTER_RESCUE = 0.5
RECOVERY_STEPS = 5000
SPIKE_AFTER_STEPS = 50
RECONSTRUCTED = 0.5  # share of a batch
LAST_RATE = 0.02  # fraction of the full rate at the end of a cooldown


class TrainingDiverged(UserError, RuntimeError):
    """A loss was not finite, or gradients stayed abnormally large after several rescues."""


class Trainer:
    """The model, its adversaries, their optimisers and the averaged weights.

    Every random number of a step comes from one generator, seeded by ``(seed, step)``, so that a
    resumed run draws the same numbers as an uninterrupted one.

    Args:
        config: how to train.
        device: where to train.
        autocast: makes the context of the networks' forward passes.
        average: averages a flat vector over processes, in place; the identity for one process.
        seed: of weights and of noise.
        rank: of this process.
        processes: number of processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]],
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
        self.model = to_device(ADEModel(config.model), device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = make_optimizer(config.optimizer, groups_of(self.model, config))
        self.adversaries = adversaries_of(config, device)
        self.step = 0
        self.spent = 0.0
        # Step after which the adversary takes part, and a GAN's generator is frozen.
        self.joint_since: int | None = None if config.likelihood_share else 0
        self.inferring_since: int | None = None
        players = ["model", *(adversary.name for adversary in self.adversaries)]
        self.skipped = dict.fromkeys(players, 0)
        self.skipped_in_a_row = dict.fromkeys(players, 0)
        # A discriminator's steps with the gradient penalty are longer, and have a mean of their
        # own: cut to that of the others, they would lose most of the penalty's weight.
        penalties = (f"{adversary.prefix}penalty" for adversary in self.adversaries)
        self.usual_norm = dict.fromkeys([*players, *penalties], 0.0)
        self.rescued_at: list[int] = []

    @property
    def inferring(self) -> bool:
        """Whether the generator is frozen and its inference network is trained."""
        return self.inferring_since is not None

    @property
    def is_joint(self) -> bool:
        """Whether the adversaries take part."""
        return bool(self.adversaries) and self.joint_since is not None and not self.inferring

    @property
    def batch_sizes(self) -> list[int]:
        """Images of each batch of the next step, as :meth:`run` takes them, over all processes."""
        if self.joint_since is None:
            return [self.config.first_batch_size]
        of_adversaries = [self.config.batch_size] if self.adversaries else []
        return [*of_adversaries, self.config.joint_batch_size]

    @property
    def operations(self) -> tuple[str, ...]:
        """Operations of the model; a GAN can only sample until its inference network is trained."""
        if self.config.inference_share and not self.inferring:
            return ("sample",)
        return self.config.model.operations

    @property
    def _age(self) -> int:
        """Steps of the present phase; averages, warm-up and norms restart with inference."""
        return self.step - (self.inferring_since or 0)

    @property
    def _quality_share(self) -> float:
        """Share of L_Q's weight: 0 while adversaries train alone, then it grows."""
        if not self.config.likelihood_share or self.joint_since is None:
            return 1.0
        age = self.step - self.joint_since - self.config.alone_steps + 1
        return min(1.0, max(0, age) / max(1, self.config.warmup_steps))

    def begin_joint(self) -> None:
        """Let the adversary take part from the next step on."""
        if self.joint_since is None:
            self.joint_since = self.step

    def begin_inference(self) -> None:
        """Freeze the averaged generator; train only what infers, and sigma (section 5)."""
        if self.inferring_since is None:
            self.model.load_state_dict(self.ema.state_dict())
            self.usual_norm["model"] = 0.0
            self.inferring_since = self.step
        self.model.requires_grad_(False)
        for parameter in inference_parameters(self.model):
            parameter.requires_grad_(True)

    def run(self, batches: list[Tensor], spent: float = 0.0) -> dict[str, float]:
        """One iteration: a step of each discriminator, then a joint step of the model.

        Args:
            batches: this process's share of uint8 images, ``(N, H, W, C)``: the discriminators'
                batch, then the model's; before adversaries take part, the model's alone.
            spent: fraction of the present phase's budget that is spent, for the cooldown.

        Returns:
            Losses by name, averaged over processes; ``bpd`` is L_C and ``kl_0`` the KL of the
            coarsest level, both in bits per dimension. Beside them the norms of gradients that are
            finite, and the number of steps skipped so far: ``grad_norm``, ``skipped`` and the
            same with ``d_`` for the discriminator. Those of a second one begin with ``pixel_``.

        Raises:
            TrainingDiverged: a loss was not finite, or gradients stayed abnormal.
        """
        noise = Noise(self.seed, self.step, self.device, self.rank, self.processes)
        self.spent = spent
        losses: dict[str, float] = {}
        features: list[list[Tensor]] = []
        if self.is_joint:
            x = self._dequantize_uniformly(self._pixels(batches[0], noise), noise)
            features = self._discriminator_steps(x, noise, losses)
        losses.update(self._model_step(self._pixels(batches[-1], noise), features, noise))
        if not self.skipped_in_a_row["model"]:
            decay = min(self.config.ema_decay, (1 + self._age) / (10 + self._age))
            update_average(self.ema, self.model, decay)
        self.step += 1
        return losses

    def _generate(self, n: int, noise: Noise) -> Tensor:
        """Draw samples, some with the decoder's noise.

        Gradients reach the flow's weights only if ``flow_sees_quality``, and never reach sigma.

        Returns:
            ``x``, ``(n, C, H, W)``, with the generator's graph.
        """
        eps, y_eps = self._eps(n, noise), None
        model = self.config.model
        self.model.flow.requires_grad_(self.config.flow_sees_quality)
        if self.config.noisy_share:
            side = model.image_size
            y_eps = noise.normal(n, model.channels, side, side)
            y_eps[~self._noisy(n)] = 0
            self.model.decoder.log_sigma.requires_grad_(False)
        with self.autocast():
            x_fake = self.model.sample(eps, y_eps)
        self.model.flow.requires_grad_(True)
        if y_eps is not None:
            self.model.decoder.log_sigma.requires_grad_(True)
        return x_fake

    def _noisy(self, n: int) -> Tensor:
        """Which of this process's n samples have the decoder's noise: bool ``(n,)``.

        They are spread evenly over the batch of all processes, so that each has its share.
        """
        places = torch.arange(self.rank * n, (self.rank + 1) * n + 1, dtype=torch.float64)
        return (places * self.config.noisy_share).floor().diff() > 0

    def _reconstruction_error(self, y_mean: Tensor, x: Tensor) -> Tensor:
        """Mean squared error of mean reconstructions, in units of x, if averaged over processes.

        It trains the flow too. The likelihood judges the flow at features of images alone, and
        says nothing about its inverse at means of ``p(y | z)``, which are no image's features: with
        the flow left out, gradients through the inverse grew a hundredfold within 300 steps.
        """
        # Of the first images of the whole batch, so that the number of processes changes nothing.
        count = math.ceil(RECONSTRUCTED * len(x) * self.processes)
        n = min(max(count - self.rank * len(x), 0), len(x))
        if not n:
            return x.new_zeros(())
        with self.autocast():
            made = self.model.flow.inverse(y_mean[:n])
        return (made.float() - x[:n]).square().mean() * (n * self.processes / count)

    def _pixels(self, images: Tensor, noise: Noise) -> Tensor:
        """A batch of images as ``(N, C, H, W)``, mirrored at random if configured."""
        pixels = images.to(self.device).permute(0, 3, 1, 2).float()
        if self.config.flips:
            pixels = torch.where(noise.uniform(len(pixels), 1, 1, 1) < 0.5, pixels.flip(3), pixels)
        return pixels

    def _dequantize_uniformly(self, pixels: Tensor, noise: Noise) -> Tensor:
        """Images for the discriminator, which needs no likelihood of them."""
        x = dequantize(pixels, noise.uniform(*pixels.shape))
        return x.contiguous(memory_format=torch.channels_last)

    def _eps(self, n: int, noise: Noise) -> list[Tensor]:
        return [noise.normal(n, *shape) for shape in self.config.model.latent_shapes]

    def _augmented(self, x: Tensor, noise: Noise) -> Tensor:
        """Images as the discriminator sees them, augmented if configured."""
        return augment(x, noise.uniform(len(x), NUMBERS)) if self.config.augment else x

    def _discriminator_steps(
        self, x: Tensor, noise: Noise, losses: dict[str, float]
    ) -> list[list[Tensor]]:
        """One step of each discriminator alone.

        Args:
            x: dequantised images, ``(N, C, H, W)``.
            noise: of this iteration.
            losses: to which theirs are added.

        Returns:
            Each discriminator's features of as many samples, with the generator's graph if the
            generator learns from them: the model has not changed since, so they give the exact
            gradient and save another pass.
        """
        with torch.set_grad_enabled(self._quality_share > 0):
            x_fake = self._generate(len(x), noise)
            real, shown = self._augmented(x, noise), self._augmented(x_fake, noise)
            with self.autocast():
                features = [its.network.features_of(shown) for its in self.adversaries]
        for adversary, of_it in zip(self.adversaries, features, strict=True):
            loss, found = adversary.loss(real, shown, of_it, noise, self.step, self.autocast)
            loss.backward()
            losses |= self._apply(
                adversary.name, adversary.prefix, adversary.network, adversary.optimizer, found
            )
        return features if self._quality_share else []

    def _model_step(
        self, pixels: Tensor, features: list[list[Tensor]], noise: Noise
    ) -> dict[str, float]:
        """One joint step: the likelihood of ``pixels``, and the quality of samples.

        Args:
            pixels: ``(N, C, H, W)``, 0..255.
            features: of the samples, for each discriminator; empty without L_Q.
            noise: of this iteration.
        """
        losses: dict[str, float] = {}
        u = noise.uniform(*pixels.shape)
        if self.config.coverage or self.inferring:
            objective, found = self._coverage_objective(pixels, u, noise)
            objective.backward()
            losses |= found
        if features:
            objective, found = self._quality_objective(features)
            objective.backward()
            losses |= found
            for adversary in self.adversaries:
                adversary.network.requires_grad_(True)
        return self._apply("model", "", self.model, self.optimizer, losses)

    def _coverage_objective(
        self, pixels: Tensor, u: Tensor, noise: Noise
    ) -> tuple[Tensor, dict[str, float]]:
        """L_C and what is added to it.

        Args:
            pixels: ``(N, C, H, W)``, 0..255.
            u: uniform noise of the dequantisation, of the same shape.
            noise: of this iteration.

        Returns:
            Scalar, bits per dimension, and the losses by name.
        """
        with self.autocast():
            dequantized = self.model.dequantize(pixels, u)
            x = dequantized.x.contiguous(memory_format=torch.channels_last)
            terms, y_mean = self.model.elbo_terms_with_analytic_kl(
                dataclasses.replace(dequantized, x=x), self._eps(len(x), noise)
            )
        loss = coverage_loss(terms, self.config.model.num_dims)
        losses = {"bpd": loss.item()}
        losses |= {
            f"kl_{level}": (kl.mean() / (self.config.model.num_dims * math.log(2.0))).item()
            for level, kl in enumerate(terms.kl)
        }
        if self.config.reconstruction_weight:
            error = self._reconstruction_error(y_mean, x.detach())
            losses["reconstruction_error"] = error.item()
            loss = loss + self.config.reconstruction_weight * error
        if self.config.free_bits:
            loss = loss + latent_surcharge(
                terms, self.config.model.num_dims, self.config.free_bits, self.average
            )
        return loss, losses

    def _quality_objective(self, features: list[list[Tensor]]) -> tuple[Tensor, dict[str, float]]:
        """``w L_Q``, the mean over discriminators, whose weights it freezes.

        Args:
            features: of the samples with their graph, for each discriminator.

        Returns:
            Scalar, and each discriminator's loss by name, without the weight.
        """
        losses, total = {}, features[0][0].new_zeros((), dtype=torch.float32)
        for adversary, of_it in zip(self.adversaries, features, strict=True):
            adversary.network.requires_grad_(False)
            with self.autocast():
                logits_fake = adversary.network.judge(of_it)
            loss = quality_loss(logits_fake)
            losses[f"{adversary.prefix}quality_loss"] = loss.item()
            total = total + loss
        weight = self.config.quality_weight * self._quality_share / len(features)
        return weight * total, losses

    def _apply(
        self,
        name: str,
        prefix: str,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        losses: dict[str, float],
    ) -> dict[str, float]:
        """Average, check and clip the gradients of a player, then step.

        Returns:
            The losses, the number of steps skipped so far, and the gradient's norm before clipping,
            which is left out if it is not finite.
        """
        gradients = {p: p.grad for p in module.parameters() if p.grad is not None}
        losses, flat = self._averaged(losses, gradients.values())
        bad = {key: value for key, value in losses.items() if not math.isfinite(value)}
        if bad:
            raise TrainingDiverged(f"step {self.step}: losses must be finite, got {bad}")
        norm = flat.norm().item()
        kind = f"{prefix}penalty" if f"{prefix}gradient_penalty" in losses else name
        usual = self.usual_norm[kind]
        if self._is_usual(name, norm, usual):
            set_clipped(gradients, flat, norm, self.config.clip * usual)
            self._set_rates(name, optimizer)
            with self.autocast():  # Muon's products of matrices
                optimizer.step()
            self.usual_norm[kind] = (
                NORM_MEMORY * usual + NORM_NEWS * min(norm, GROWTH * usual) if usual else norm
            )
            self.skipped_in_a_row[name] = 0
        else:
            self._skip(name, norm, usual)
        optimizer.zero_grad(set_to_none=True)
        prefix = "" if name == "model" else f"{prefix}d_"
        losses[f"{prefix}skipped"] = self.skipped[name]
        if math.isfinite(norm):
            losses[f"{prefix}grad_norm"] = norm
        return losses

    def _averaged(
        self, losses: dict[str, float], gradients: Iterable[Tensor]
    ) -> tuple[dict[str, float], Tensor]:
        """The losses and the flat gradient, averaged over processes in one exchange."""
        local = torch.tensor(list(losses.values()), device=self.device)
        flat = self.average(torch.cat([local, *(gradient.flatten() for gradient in gradients)]))
        values, gradient = flat[: len(local)], flat[len(local) :]
        return dict(zip(losses, values.tolist(), strict=True)), gradient

    def _is_usual(self, name: str, norm: float, usual: float) -> bool:
        """Whether a step with a gradient of this norm can be made.

        Large gradients of a discriminator are legitimate: it reacts to a weakness that the model
        has found.
        """
        return math.isfinite(norm) and (
            name != "model" or self._age < SPIKE_AFTER_STEPS or usual == 0 or norm < SPIKE * usual
        )

    def _skip(self, name: str, norm: float, usual: float) -> None:
        """Count a step that is not made; rescue the model after too many in a row."""
        self.skipped[name] += 1
        self.skipped_in_a_row[name] += 1
        if self.skipped_in_a_row[name] >= MAX_SKIPPED_STEPS:
            self._rescue(
                name,
                f"{MAX_SKIPPED_STEPS} steps in a row had gradients that were not finite or "
                f"whose norm was over {SPIKE:g} times its running mean (last {norm:.3g}, "
                f"mean {usual:.3g})",
            )

    def _set_rates(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Give an optimiser's groups the rates and betas of this step."""
        is_alone = name == "model" and self.joint_since is None
        share = self._rate_share(name)
        for group in optimizer.param_groups:
            group |= rates(self.config, "" if is_alone else group["prefix"])
            if is_alone and self.config.likelihood_learning_rate:
                group["lr"] = self.config.likelihood_learning_rate
            group["lr"] *= share

    def _rate_share(self, name: str) -> float:
        """Fraction of the highest rates: lower in warm-up and cooldown, and after a rescue."""
        rescues = [
            step
            for step in self.rescued_at
            if name == "model" and step >= (self.inferring_since or 0)
        ]
        begun = 0 if name == "model" else self.joint_since or 0
        age = min([self._age - begun, *(self.step - step for step in rescues[-1:])])
        share = min(1.0, (age + 1) / max(1, self.config.warmup_steps))
        for step in rescues:
            share *= RATE_AFTER_RESCUE ** max(0.0, 1 - (self.step - step) / RECOVERY_STEPS)
        if self.spent > 1 - self.config.cooldown:
            share *= LAST_RATE + (1 - LAST_RATE) * max(0.0, 1 - self.spent) / self.config.cooldown
        return share

    def _rescue(self, name: str, why: str) -> None:
        """Return to the averaged weights, with a new optimiser state and half the rate."""
        memory = max(round(1 / (1 - self.config.ema_decay)), RESCUES_WITHIN)
        self.rescued_at.append(self.step)
        if (
            name != "model"
            or sum(self.step - step < memory for step in self.rescued_at) > MAX_RESCUES
        ):
            raise TrainingDiverged(f"step {self.step}: {why}")
        logger.warning(
            "step %d: %s; training restarts from the averaged weights at half the rate",
            self.step,
            why,
        )
        self.model.load_state_dict(self.ema.state_dict())
        self.optimizer.state.clear()
        self.skipped_in_a_row[name] = 0
