"""Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.9  # at least; Adam's beta1 where that is larger
MIN_CHANNELS = 16  # input and output: the steps of a narrower kernel are Adam's
# Of the polynomial by which Newton-Schulz iterations raise all singular values close to 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
# Root mean square of a step's elements, in rates: about that of Adam's steps, so that both share
# rates (Liu et al., "Muon is scalable for LLM training", 2025). The elements of orthonormal rows or
# columns have 1 / sqrt(longer side).
_ADAMS_SIZE = 0.2


class Muon(torch.optim.Adam):
    """Adam, but for 3 × 3 kernels of at least :data:`MIN_CHANNELS` input and output channels.

    Their steps are momenta whose singular values are all made about 1, so that rare directions are
    learnt as fast as frequent ones. A kernel ``(out, in, 3, 3)`` is the matrix ``(out, 9 in)``.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; see :class:`torch.optim.Optimizer`."""
        own = [
            (group, p)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and _is_wide(p)
        ]
        by_shape: dict[torch.Size, list[tuple[Tensor, float, Tensor]]] = {}
        for group, p in own:
            momentum = max(group["betas"][0], MOMENTUM)
            state = self.state[p]
            if not state:
                state |= {"step": torch.zeros(()), "mean": torch.zeros_like(p)}
            state["step"] += 1  # which Adam expects of all weights when it is loaded
            mean = state["mean"]
            mean.lerp_(p.grad, 1 - momentum)
            update = p.grad.lerp(mean, momentum).flatten(1)  # Nesterov's
            by_shape.setdefault(update.shape, []).append((p, group["lr"], update))
        for shape, alike in by_shape.items():
            updates = orthogonalized(torch.stack([update for _, _, update in alike]))
            for (p, rate, _), update in zip(alike, updates, strict=True):
                p.add_(update.view_as(p), alpha=-rate * _ADAMS_SIZE * max(shape) ** 0.5)
        gradients = [p.grad for _, p in own]
        for _, p in own:  # for which Adam shall do nothing
            p.grad = None
        result = super().step(closure)
        for (_, p), gradient in zip(own, gradients, strict=True):
            p.grad = gradient
        return result


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices with the same singular vectors, and singular values between about 0.7 and 1.2.

    Args:
        matrices: ``(..., m, n)``; under autocast they are rounded once.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = _A * x + (_B * square + _C * square @ square) @ x
    found: Tensor = x.mT if is_tall else x
    return found.to(matrices.dtype)


def _is_wide(parameter: Tensor) -> bool:
    return parameter.shape[2:] == (3, 3) and min(parameter.shape[:2]) >= MIN_CHANNELS
