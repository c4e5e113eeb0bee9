"""The random numbers of a training step."""

from __future__ import annotations

import torch
from torch import Tensor


class Noise:
    """The random numbers of one step.

    Each process draws those of the whole batch and keeps its share, so that the result does not
    depend on the number of processes. A projected discriminator's does: it compares the images of
    one process's share with each other.
    """

    def __init__(
        self, seed: int, step: int, device: torch.device, rank: int, processes: int
    ) -> None:
        self._generator = torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)
        self._device = device
        self._rank, self._processes = rank, processes

    def uniform(self, n: int, *shape: int) -> Tensor:
        """Uniform numbers on [0, 1), ``(n, *shape)``."""
        return self._mine(
            torch.rand(n * self._processes, *shape, generator=self._generator, device=self._device)
        )

    def normal(self, n: int, *shape: int) -> Tensor:
        """Standard normal numbers, ``(n, *shape)``."""
        return self._mine(
            torch.randn(n * self._processes, *shape, generator=self._generator, device=self._device)
        )

    def _mine(self, values: Tensor) -> Tensor:
        return values.chunk(self._processes)[self._rank]
