"""The networks that lossless coding evaluates one by one, as graphs of a bundle.

The score graph computes everything at once. A coder needs the networks singly, because it must
evaluate each on integers that it has just decoded: one graph for each coupling layer and for each
step of a learned dequantisation, one for the encoder, one for each posterior, and one for each
stage of the decoder. All take one image. The graphs refer to ``model.safetensors`` for their
weights. ``codec.json`` says in which order they are used, and ``codec.npz`` holds the constants in
between.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_base.errors import UserError
from ade_base.system import cpu_session
from ade_model.bijections import (
    AffineCoupling,
    Bijection,
    Chain,
    CheckerboardCoupling,
    Logit,
    OnHalfOfTheChannels,
    Rotation,
)
from ade_model.dequantizer import ORDER, Dequantizer
from ade_model.distributions import DiagonalGaussian
from ade_model.flow import Unsqueezed
from ade_model.model import ADEModel
from ade_model.quantization import NUM_LEVELS
from ade_model.vae import Decoder, Level
from export.to_onnx import point_at_weights, traced
from extensions.codec.lifting import COEFFICIENT_BITS, factorize
from extensions.codec.networks import CODEC_ARRAYS_NAME, CODEC_NAME, CODEC_VERSION
from serving.engine.bundle import (
    WEIGHTS_NAME,
)

GRID_BITS = 16  # of the flow's values: finer steps cost initial bits, coarser ones likelihood
LATENT_BITS = 8  # posteriors are at least four steps wide
MAX_DIFFERENCE = 1e-3  # of a graph's outputs, relative to 1 + their size


class CodecError(UserError, ValueError):
    """The model cannot code images."""


class _CouplingNet(nn.Module):
    def __init__(self, coupling: AffineCoupling | CheckerboardCoupling) -> None:
        super().__init__()
        self.coupling = coupling

    def forward(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        return self.coupling.log_scale_and_shift(kept)


class _Context(nn.Module):
    def __init__(self, dequantizer: Dequantizer) -> None:
        super().__init__()
        self.dequantizer = dequantizer

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        return (self.dequantizer.context_of(pixels),)


class _Corner(nn.Module):
    def __init__(self, dequantizer: Dequantizer, index: int) -> None:
        super().__init__()
        self.dequantizer = dequantizer
        self.index = index

    def forward(self, context: Tensor, known: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.dequantizer.terms(self.index, context, [] if known is None else [known])


class _EncoderMaps(nn.Module):
    """The maps of the resolutions with latents, coarsest first."""

    def __init__(self, encoder: nn.Module, levels: list[Level]) -> None:
        super().__init__()
        self.encoder = encoder
        self.resolutions = sorted({level.resolution for level in levels if level.has_latents})

    def forward(self, y: Tensor) -> tuple[Tensor, ...]:
        maps = self.encoder(y)
        return tuple(maps[resolution] for resolution in self.resolutions)


class _Posterior(nn.Module):
    def __init__(self, level: Level) -> None:
        super().__init__()
        self.level = level

    def forward(
        self, features: Tensor, encoded: Tensor, prior_mean: Tensor, prior_log_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert self.level.posterior_net is not None
        both = torch.cat([features, encoded], dim=1)
        shift, log_scale = self.level.posterior_net(both).chunk(2, dim=1)
        prior = DiagonalGaussian(prior_mean, prior_log_scale)
        found = self.level.posterior(prior, shift, log_scale)
        return found.mean, found.log_scale


class _Stage(nn.Module):
    """From a level's features and latents to the next level with latents, or to the mean of y."""

    def __init__(self, levels: list[Level], decoder: Decoder | None) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.patch = decoder.patch if decoder else 1
        self.to_mean = decoder.to_mean if decoder else None

    def forward(self, features: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        first, *others = self.levels
        h = first.finish(features, z)  # type: ignore[operator]  # untyped in ModuleList
        for level in others:
            h = level.start(h, 1)  # type: ignore[operator]
            if level.has_latents:
                prior = level.prior(h)  # type: ignore[operator]
                return h, prior.mean, prior.log_scale
            h = level.finish(h, None)  # type: ignore[operator]
        assert self.to_mean is not None
        return (F.pixel_shuffle(self.to_mean(h), self.patch),)


def check_codable(config: dict[str, Any]) -> None:
    """Check the ``config.json`` of a model.

    Raises:
        CodecError: its model has no likelihood, or one that cannot be coded in reasonable time.
    """
    model = config["model"]
    if not model.get("encoder", True) or "score" not in config.get("operations", ["score"]):
        raise CodecError(
            f"a model of the recipe {config.get('recipe')} cannot code images: it has no inference "
            "network, so it gives them no likelihood"
        )
    if model.get("posterior_iaf"):
        raise CodecError(
            f"a model of the recipe {config.get('recipe')} cannot code images: its posteriors are "
            "autoregressive, so decoding would evaluate a network once for each latent value"
        )


def write_codec(model: ADEModel, folder: Path) -> None:
    """Write the codec of a model into a folder that already holds ``model.safetensors``.

    Args:
        model: float32, on the CPU, checked by :func:`check_codable`.
        folder: of the bundle. Its manifest must be written afterwards.

    Raises:
        CodecError: a graph does not compute what the model computes.
    """
    writer = _Writer(copy.deepcopy(model).eval().requires_grad_(False), folder)
    writer.write()


class _Writer:
    def __init__(self, model: ADEModel, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.arrays: dict[str, np.ndarray] = {}
        self.rotations = 0
        self.couplings = 0

    def write(self) -> None:
        config = self.model.config
        x = torch.full((1, config.channels, config.image_size, config.image_size), 0.3)
        corners = self._dequantizer()
        steps = self._flow(self.model.flow, x)
        levels = self._levels() if config.widths else 0
        np.savez_compressed(self.folder / CODEC_ARRAYS_NAME, **self.arrays)  # type: ignore[arg-type]
        program = {
            "format_version": CODEC_VERSION,
            "grid_bits": GRID_BITS,
            "latent_bits": LATENT_BITS,
            "rotation_bits": COEFFICIENT_BITS,
            "levels": levels,
            "flow": steps,
            **corners,
        }
        (self.folder / CODEC_NAME).write_text(json.dumps(program, indent=1) + "\n")

    def _dequantizer(self) -> dict[str, list[int]]:
        """Its graphs, if the model has one, and its field of the program."""
        dequantizer, config = self.model.dequantizer, self.model.config
        if dequantizer is None:
            return {}
        side = config.image_size
        pixels = torch.linspace(0, 255, config.num_dims).reshape(1, config.channels, side, side)
        (context,) = self._graph(
            _Context(dequantizer), "codec-context", {"pixels": pixels}, ["context"]
        )
        for i in range(len(ORDER)):
            known = torch.linspace(-2, 2, i * config.channels * (side // 2) ** 2)
            inputs = {"context": context}
            if i:
                inputs["known"] = known.reshape(1, -1, side // 2, side // 2)
            self._graph(
                _Corner(dequantizer, i),
                f"codec-corner-{i}",
                inputs,
                ["log_scale", "shift", "mixing"],
            )
        return {"corners": list(ORDER)}

    def _flow(self, flow: Bijection, x: Tensor) -> list[dict[str, Any]]:
        pixels = np.arange(NUM_LEVELS + 1) / NUM_LEVELS
        layers = list(flow.layers) if isinstance(flow, Chain) else [flow]
        if layers and isinstance(layers[0], Logit):
            pixels = layers[0].transform(torch.from_numpy(pixels))[0].numpy()
            layers = layers[1:]
        self.arrays["edges"] = np.rint(pixels * 2.0**GRID_BITS).astype(np.int64)
        return [step for layer in layers for step in self._steps(layer, x)]

    def _steps(self, layer: nn.Module, x: Tensor) -> list[dict[str, Any]]:
        """One layer's steps; ``x`` is an example of its input."""
        if isinstance(layer, Chain):
            return [step for inner in layer.layers for step in self._steps(inner, x)]
        if isinstance(layer, Unsqueezed):
            inner = self._steps(layer.inner, F.pixel_unshuffle(x, 2))
            return [{"do": "squeezed", "steps": inner}]
        if isinstance(layer, OnHalfOfTheChannels):
            inner = self._steps(layer.inner, x[:, : x.shape[1] // 2])
            return [{"do": "on_half", "steps": inner}]
        if isinstance(layer, Rotation):
            name = f"rotation_{self.rotations}"
            self.rotations += 1
            lifting = factorize(copy.deepcopy(layer).double().matrix().numpy())
            self.arrays |= {f"{name}_{field}": value for field, value in vars(lifting).items()}
            return [{"do": "rotate", "rotation": name}]
        if isinstance(layer, (AffineCoupling, CheckerboardCoupling)):
            name = f"codec-coupling-{self.couplings:02}"
            self.couplings += 1
            colour = None
            if isinstance(layer, AffineCoupling):
                kept = x[:, : layer.kept]
            else:
                kept, colour = x * layer.kept, int(layer.kept[0, 0])
            self._graph(_CouplingNet(layer), name, {"kept": kept}, ["log_scale", "shift"])
            return [{"do": "couple", "graph": name, "first_pixel_kept": colour}]
        raise CodecError(f"a layer {type(layer).__name__} cannot be coded")

    def _levels(self) -> int:
        decoder, encoder = self.model.decoder, self.model.encoder
        assert isinstance(decoder, Decoder) and encoder is not None
        levels = decoder.all_levels
        config = self.model.config
        y = torch.linspace(-1, 1, config.num_dims).reshape(
            1, config.channels, config.image_size, config.image_size
        )
        latent = [i for i, level in enumerate(levels) if level.has_latents]
        encoded = self._graph(
            _EncoderMaps(encoder, levels),
            "codec-encoder",
            {"y": y},
            [f"encoded_{i}" for i in range(len(latent) // config.latent_groups)],
        )
        features = levels[0].start(None, 1)
        prior = levels[0].prior(features)
        mean, log_scale = prior.mean, prior.log_scale
        self.arrays |= {
            "features": features.contiguous().numpy(),
            "prior_mean": mean.numpy(),
            "prior_log_scale": log_scale.numpy(),
            "log_sigma": decoder.log_sigma.expand_as(y[0]).contiguous().numpy(),
        }
        for i, first in enumerate(latent):
            q = {"features": features, "encoded": encoded[i // config.latent_groups]}
            q |= {"prior_mean": mean, "prior_log_scale": log_scale}
            z, _ = self._graph(
                _Posterior(levels[first]), f"codec-posterior-{i}", q, ["mean", "log_scale"]
            )
            is_last = i + 1 == len(latent)
            end = len(levels) if is_last else latent[i + 1] + 1
            results = self._graph(
                _Stage(levels[first:end], decoder if is_last else None),
                f"codec-stage-{i + 1}",
                {"features": features, "z": z},
                ["y_mean"] if is_last else ["next_features", "prior_mean", "prior_log_scale"],
            )
            if not is_last:
                features, mean, log_scale = results
        return len(latent)

    def _graph(
        self, module: nn.Module, name: str, example: dict[str, Tensor], outputs: list[str]
    ) -> list[Tensor]:
        """Write one graph, compare it with the module, and return the module's outputs."""
        example = {key: value.contiguous() for key, value in example.items()}
        proto = traced(module.eval(), example, outputs, None)
        point_at_weights(proto, self.folder / WEIGHTS_NAME)
        path = self.folder / f"{name}.onnx"
        path.write_bytes(proto.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(path))
        with torch.inference_mode():
            expected = list(module(*example.values()))
        session = cpu_session(path)
        inputs = {i.name for i in session.get_inputs()}
        found = session.run(outputs, {k: v.numpy() for k, v in example.items() if k in inputs})
        for value, reference in zip(found, expected, strict=True):
            gap = np.abs(np.asarray(value) - reference.numpy()) / (1 + np.abs(reference.numpy()))
            if not float(gap.max()) <= MAX_DIFFERENCE:
                raise CodecError(f"{name}.onnx differs from the model by {gap.max():.3g}, relative")
        return expected
