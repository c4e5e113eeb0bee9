"""Weights of a larger model that starts where a smaller one ended.

After Chen et al., "Net2Net: Accelerating Learning via Knowledge Transfer", 2016: the added parts
compute nothing at first, so that the training of the smaller model is kept.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor

from ade_base.errors import ConfigError
from ade_model.bijections import Rotation
from ade_model.config import ModelConfig
from ade_model.model import ADEModel

GROWS = (
    "latent_channels",
    "decoder_blocks",
    "flow_scales",
    "flow_couplings",
    "flow_blocks",
    "flow_width",
    "posterior_bound",
    "dequantizer_width",
)
# Rows of the posterior for new latent channels: small, so that their KL is small, but not zero,
# because the decoder cannot learn to use a channel that carries no information.
NEW_POSTERIOR_SCALE = 0.1


def grown_weights(weights: dict[str, Tensor], before: ModelConfig, model: ADEModel) -> None:
    """Give ``model`` the weights of a smaller one, in place.

    Samples stay the same, and so does the bound, apart from the KL of new latent channels and from
    posteriors that ``posterior_bound`` narrows.

    Args:
        weights: the state dict of the smaller model.
        before: its configuration.
        model: freshly initialised. It may have more of the fields in :data:`GROWS`.

    Raises:
        ConfigError: another field differs, or one became smaller.
    """
    check_growth(before, model.config)
    state = model.state_dict()
    kept = {_renumbered(name, before, model.config): value for name, value in weights.items()}
    for name, module in model.named_modules():
        if isinstance(module, Rotation) and f"{name}.normals" not in kept:
            state[f"{name}.normals"] = _swap_of_halves(module.normals.shape[0])
    _undo_odd_swaps(state, kept, model)
    for name, value in kept.items():
        latents = re.fullmatch(r"decoder\.levels\.\d+\.(\w+)(?:\.1)?\.(?:weight|bias)", name)
        if value.shape == state[name].shape:
            state[name] = value
        elif latents and latents[1] in ("prior_net", "posterior_net"):
            state[name] = _more_latents(value, state[name], fresh=latents[1] == "posterior_net")
        else:
            state[name] = _padded(value, state[name])
    model.load_state_dict(state)


def check_growth(before: ModelConfig, after: ModelConfig) -> None:
    """Raise ConfigError unless ``after`` is ``before`` with more of what can grow."""
    old, new = dataclasses.asdict(before), dataclasses.asdict(after)
    different = [name for name in old if old[name] != new[name]]
    fixed = [name for name in different if name not in GROWS]
    if different and before.flow_mask != "channel":
        fixed += [name for name in different if name.startswith("flow_")]
    if "latent_channels" in different and before.posterior_iaf:
        fixed.append("latent_channels")
    if "flow_scales" in different and not before.flow_scales:
        fixed.append("flow_scales")
    if fixed:
        raise ConfigError(_message(fixed[0], old, new, "must be equal"))
    for name in different:
        pairs = list(zip(_entries(new[name]), _entries(old[name]), strict=True))
        if any(n < o for n, o in pairs):
            raise ConfigError(_message(name, old, new, "may grow, not shrink"))
        if isinstance(old[name], tuple) and any(n > o == 0 for n, o in pairs):
            rule = "cannot become positive at a resolution where it is 0"
            raise ConfigError(_message(name, old, new, rule))


def _message(name: str, old: dict[str, Any], new: dict[str, Any], rule: str) -> str:
    return (
        f"{name} of a model and of the one that it starts from {rule}: {old[name]} to {new[name]}"
    )


def _entries(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _renumbered(name: str, before: ModelConfig, after: ModelConfig) -> str:
    """Renumber the layers that follow a list of couplings or residual blocks that grows."""
    name = re.sub(
        rf"\.coupling_net\.{before.flow_blocks + 2}\.",
        f".coupling_net.{after.flow_blocks + 2}.",
        name,
    )
    return re.sub(
        rf"\.layers\.{2 * before.flow_couplings}\.inner\.",
        f".layers.{2 * after.flow_couplings}.inner.",
        name,
    )


def _swap_of_halves(channels: int) -> Tensor:
    """Householder normals whose reflections exchange the first and the second half of channels.

    Two such rotations are the identity, and the couplings after them change one half each.
    """
    half = channels // 2
    normals = torch.zeros(channels, channels)
    for i in range(half):
        normals[i, i], normals[i, i + half] = 1.0, -1.0
    normals[half:] = _pairs(channels - half, channels)
    return normals


def _pairs(count: int, channels: int) -> Tensor:
    """Normals in equal pairs: each pair's two reflections cancel."""
    return torch.randn(count // 2, channels).repeat_interleave(2, dim=0)


def _undo_odd_swaps(state: dict[str, Tensor], kept: dict[str, Tensor], model: ADEModel) -> None:
    """In each chain with an odd number of new rotations, make the last one the identity."""
    new: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Rotation) and f"{name}.normals" not in kept:
            new.setdefault(name.rpartition(".")[0], []).append(f"{name}.normals")
    for names in new.values():
        if len(names) % 2:
            channels = state[names[-1]].shape[0]
            state[names[-1]] = _pairs(channels, channels)


def _more_latents(old: Tensor, new: Tensor, fresh: bool) -> Tensor:
    """Rows of means, then rows of log-scales, with new channels after the old ones in each half.

    A new channel's prior is standard normal; its posterior's mean depends on the image.
    """
    means, log_scales = (torch.zeros_like(half) for half in new.chunk(2))
    count = len(old) // 2
    if fresh:
        means[count:] = NEW_POSTERIOR_SCALE * new[count : len(new) // 2]
    means[:count], log_scales[:count] = old.chunk(2)
    return torch.cat([means, log_scales])


def _padded(old: Tensor, new: Tensor) -> Tensor:
    """Pad with fresh weights for new outputs, and with zeros for new inputs of old outputs."""
    padded = new.clone()
    if old.ndim > 1:
        padded[: old.shape[0], old.shape[1] :] = 0
    padded[tuple(slice(length) for length in old.shape)] = old
    return padded
