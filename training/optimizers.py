"""The optimisers of a run: groups of weights, clipped gradients and averaged weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ade_model.model import ADEModel
from ade_model.vae import Decoder
from training.config import TrainConfig
from training.muon import Muon


def make_optimizer(kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimiser of one of :data:`training.config.OPTIMIZERS`; groups may be empty."""
    kinds: dict[str, type[torch.optim.Adam | torch.optim.Adamax]] = {
        "adam": torch.optim.Adam,
        "adamax": torch.optim.Adamax,
        "muon": Muon,
    }
    return kinds[kind]([group for group in groups if group["params"]])


def group_of(config: TrainConfig, prefix: str, parameters: list[nn.Parameter]) -> dict[str, Any]:
    """An optimiser's group of weights whose rate and betas have a prefix in the config."""
    return {"params": parameters, "prefix": prefix, **rates(config, prefix)}


def rates(config: TrainConfig, prefix: str) -> dict[str, Any]:
    """A prefix's highest rate, and its betas."""
    rate, beta1, beta2 = (
        getattr(config, prefix + name) for name in ("learning_rate", "beta1", "beta2")
    )
    return {"lr": rate, "betas": (beta1, beta2)}


def groups_of(model: ADEModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups of the weights that only the likelihood trains, and of those that make samples.

    Adversarial training needs low rates and betas, with which the likelihood learns more slowly.
    """
    if config.discriminator is None:
        return [group_of(config, "", list(model.parameters()))]
    generator = set(model.decoder.parameters()) - set(inference_parameters(model))
    if config.flow_sees_quality:
        generator |= set(model.flow.parameters())
    return [
        group_of(config, "", [p for p in model.parameters() if p not in generator]),
        group_of(config, "g_", [p for p in model.parameters() if p in generator]),
    ]


def inference_parameters(model: ADEModel) -> list[nn.Parameter]:
    """Weights of ``q(z | x)``, of the dequantiser, and sigma: a mean sample depends on none.

    Empty for a flow alone.
    """
    if not isinstance(model.decoder, Decoder):
        return []
    modules = [
        *model.decoder.inference_modules(),
        *(network for network in (model.encoder, model.dequantizer) if network),
    ]
    return [model.decoder.log_sigma, *(p for module in modules for p in module.parameters())]


def set_clipped(parameters: Iterable[nn.Parameter], flat: Tensor, norm: float, most: float) -> None:
    """Give parameters their parts of the flat gradient, which is shortened in place.

    Adam ignores the usual scale of gradients, but an outlier would move weights far and, through
    the mean of squares, shorten the steps after it.

    Args:
        parameters: in the order of their gradients.
        flat: the gradient.
        norm: its norm.
        most: the norm to which a longer one is shortened; 0 for no bound.
    """
    kept = min(norm, most) if most else norm
    flat *= kept / (norm + 1e-12)
    offset = 0
    for p in parameters:
        p.grad = flat[offset : offset + p.numel()].view(p.shape)
        offset += p.numel()


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move averaged weights towards those of a module."""
    pairs = list(zip(average.parameters(), module.parameters(), strict=True))
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)
