"""The model as graphs of tensors, with pixels and noise as inputs.

All graphs are methods of one module, so that TorchScript stores the weights once. :class:`Graph`
wraps a single method for the ONNX exporter. Inputs and outputs are those of
:mod:`serving.engine.signatures`.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_model.bijections import Bijection, Rotation, zero_log_det
from ade_model.model import ADEModel
from ade_model.quantization import dequantize, quantize


class _FixedRotation(Bijection):
    """A trained :class:`Rotation` with a constant matrix."""

    kernel: Tensor
    inverse_kernel: Tensor

    def __init__(self, rotation: Rotation) -> None:
        super().__init__()
        dtype = rotation.normals.dtype
        matrix = copy.deepcopy(rotation).double().matrix().detach()
        self.register_buffer("kernel", matrix[:, :, None, None].to(dtype))
        self.register_buffer("inverse_kernel", matrix.t()[:, :, None, None].contiguous().to(dtype))

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(x, self.kernel), zero_log_det(x)

    def inverse(self, y: Tensor) -> Tensor:
        return F.conv2d(y, self.inverse_kernel)


def _fix_rotations(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, Rotation):
            setattr(module, name, _FixedRotation(child))
        else:
            _fix_rotations(child)


class Graphs(nn.Module):
    """Every graph of a bundle as a method of a copy of the model in evaluation mode."""

    def __init__(self, model: ADEModel) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.model.config = model.config
        _fix_rotations(self.model)
        self.levels = len(model.config.latent_shapes)

    def sample(self, *inputs: Tensor) -> Tensor:
        *eps, y_eps = inputs
        return _to_images(self.model.sample(eps, y_eps))

    def decode(self, *inputs: Tensor) -> Tensor:
        *z, y_eps = inputs
        return _to_images(self.model.decode(z, y_eps))

    def encode(self, images: Tensor, *eps: Tensor) -> tuple[Tensor, ...]:
        encoding = self.model.encode(self._typical_x(images, eps[0]), list(eps))
        means = [posterior.mean for posterior in encoding.posteriors]
        log_scales = [posterior.log_scale for posterior in encoding.posteriors]
        return (*means, *log_scales, *encoding.z)

    def flow_forward(self, images: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        # The flow alone, so without a learned dequantisation, which `score` has.
        x = dequantize(_to_planes(images, u), u.permute(0, 3, 1, 2))
        y, log_det_jacobian = self.model.flow(x)
        return y, log_det_jacobian

    def flow_inverse(self, y: Tensor) -> Tensor:
        return self.model.flow.inverse(y)

    def reconstruct(self, images: Tensor, *inputs: Tensor) -> Tensor:
        *eps, y_eps = inputs
        return _to_images(self.model.reconstruct(self._typical_x(images, y_eps), eps, y_eps))

    def score(self, images: Tensor, u: Tensor, *eps: Tensor) -> tuple[Tensor, ...]:
        dequantized = self.model.dequantize(_to_planes(images, u), u.permute(0, 3, 1, 2))
        found = self.model.examine(dequantized, list(eps))
        terms = found.terms
        nats = torch.stack([-terms.log_prob_y, -terms.log_det_jacobian, *terms.kl], dim=1)
        parts = nats / (self.model.config.num_dims * math.log(2.0))
        cost = found.cost_nats / math.log(2.0)
        return parts, cost, found.y, found.residual, *found.standardized_z

    def _typical_x(self, images: Tensor, like: Tensor) -> Tensor:
        planes = _to_planes(images, like)
        return self.model.dequantize(planes, torch.full_like(planes, 0.5)).x


class Graph(nn.Module):
    """One method of :class:`Graphs` as ``forward``."""

    def __init__(self, graphs: Graphs, name: str) -> None:
        super().__init__()
        self.graphs = graphs
        self._name = name

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        result: Tensor | tuple[Tensor, ...] = getattr(self.graphs, self._name)(*inputs)
        return result


def _to_planes(images: Tensor, like: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).to(like.dtype)


def _to_images(x: Tensor) -> Tensor:
    return quantize(x).permute(0, 2, 3, 1).to(torch.uint8)
