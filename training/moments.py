"""Matching of moments: generated images move towards the distribution of real ones.

A discriminator judges images one by one, or compares the few of a batch, so a generator that shows
few kinds of things can satisfy it. The mean and the covariance of frozen features over many images
reveal that (dos Santos et al., "Learning Implicit Generative Models by Matching Perceptual
Features", 2019, who match means and variances). Here the optimal transport map between two normal
distributions says where the features of each generated image should be (Peyré and Cuturi,
"Computational Optimal Transport", 2019, remark 2.31); the way there is the gradient of the Fréchet
distance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SCALING_STEPS = 30  # real batches that give the scale of the features; nothing else happens then
MAPPING_STEPS = 50  # the next steps, in which the moments of both kinds gather
GROWING_STEPS = 200  # the next steps, in which the loss grows to its full weight
REAL_STEPS = 400  # real batches that count
MAP_EVERY = 5  # steps
# How many generated images the moments remember. The generator follows them, and overshoots where
# they lag behind it: with 4,800 images, a weight of 0.25 and no gradual start, all samples became
# one image within 20 steps.
MEAN_IMAGES, COVARIANCE_IMAGES = 480, 1600
LIMIT = 8.0  # standard deviations: features beyond count as this far, and are not moved
RIDGE = 0.01  # added to the variances, which are 1 for real images


class MomentMatching(nn.Module):
    """The moments of real and of generated features, and the map between them.

    Its whole state is in the state dict. It is the same in all processes.

    Args:
        dims: features per image.
        average: averages a flat vector over processes, in place.
        processes: number of processes, which may have features of different numbers of images.
    """

    step: Tensor
    center: Tensor
    scale: Tensor
    real_mean: Tensor
    real_covariance: Tensor
    mean: Tensor
    covariance: Tensor
    map: Tensor
    map_from: Tensor
    map_to: Tensor

    def __init__(self, dims: int, average: Callable[[Tensor], Tensor], processes: int = 1) -> None:
        super().__init__()
        self._average = average
        self._processes = processes
        for name in ("center", "scale", "real_mean", "mean", "map_from", "map_to"):
            self.register_buffer(name, torch.zeros(dims, dtype=torch.float64))
        for name in ("real_covariance", "covariance", "map"):
            self.register_buffer(name, torch.zeros(dims, dims, dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def needs_real(self) -> bool:
        """Whether :meth:`update` still takes features of real images."""
        return int(self.step) < REAL_STEPS

    @torch.no_grad()
    def update(self, generated: Tensor, real: Tensor | None, images: int) -> None:
        """Count the features of a step.

        Args:
            generated: ``(N, dims)``, this process's.
            real: the same of real images, while :attr:`needs_real`.
            images: generated in this step by all processes.
        """
        self.step += 1
        step = int(self.step)
        if step <= SCALING_STEPS:
            assert real is not None
            self._follow("real_", real.double(), len(real), 1 / step)
            if step == SCALING_STEPS:
                self.center.copy_(self.real_mean)
                self.scale.copy_(self.real_covariance.diagonal().sqrt().clamp_min(1e-6))
            return
        counted = step - SCALING_STEPS
        if real is not None:
            self._follow("real_", self._standardized(real), len(real), 1 / counted)
        self._follow(
            "",
            self._standardized(generated),
            images / self._processes,
            max(1 / counted, min(1.0, images / MEAN_IMAGES)),
            max(1 / counted, min(1.0, images / COVARIANCE_IMAGES)),
        )
        if counted >= MAPPING_STEPS and counted % MAP_EVERY == 0:
            self._update_map()

    def loss(self, generated: Tensor, images: int) -> Tensor:
        """Mean squared distance of features to where the map takes them; 0 without a map.

        Args:
            generated: ``(N, dims)``, with a gradient.
            images: generated in this step by all processes.

        Returns:
            Scalar whose mean over processes is the loss, in variances of the real features; smaller
            in the first steps with a map.
        """
        grown = (int(self.step) - SCALING_STEPS - MAPPING_STEPS + 1) / GROWING_STEPS
        if grown <= 0:
            return generated.new_zeros(())
        features = self._standardized(generated)
        with torch.no_grad():
            target = self.map_to + (features - self.map_from) @ self.map
        squares = (features - target).square().sum()
        return min(1.0, grown) * (squares * self._processes / (images * features.shape[1])).float()

    def _standardized(self, features: Tensor) -> Tensor:
        return ((features.double() - self.center) / self.scale).clamp(-LIMIT, LIMIT)

    def _follow(
        self,
        prefix: str,
        features: Tensor,
        count: float,
        share: float,
        covariance_share: float | None = None,
    ) -> None:
        """Move the moments a share of the way to a batch's, of ``count`` images per process."""
        mean, covariance = getattr(self, prefix + "mean"), getattr(self, prefix + "covariance")
        mean.lerp_(self._average(features.sum(0)) / count, share)
        centered = features - mean
        of_batch = self._average((centered.T @ centered).flatten()) / count
        covariance.lerp_(of_batch.view_as(covariance), covariance_share or share)

    def _update_map(self) -> None:
        """``S^-1/2 (S^1/2 R S^1/2)^1/2 S^-1/2`` for covariances S, generated, and R, real."""
        ridge = RIDGE * torch.eye(len(self.mean), dtype=self.map.dtype, device=self.map.device)
        root, inverse = _roots(self.covariance + ridge)
        between, _ = _roots(root @ (self.real_covariance + ridge) @ root)
        self.map.copy_(inverse @ between @ inverse)
        self.map_from.copy_(self.mean)
        self.map_to.copy_(self.real_mean)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a positive definite matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    roots = values.clamp_min(1e-12).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
