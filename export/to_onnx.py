"""Export to ONNX files whose weights are references into ``model.safetensors``.

All graphs thus share one copy of the weights.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxscript import opset20 as op
from torch import nn

from ade_base.files import replacing
from ade_model.exporting import quiet_export
from export.feature_source import DATA_KEY
from export.graphs import Graph, Graphs
from serving.engine.bundle import WEIGHTS_NAME
from serving.engine.signatures import inputs_of, outputs_of

OPSET = 20
STORED_TYPES: dict[str, tuple[str, int]] = {
    "F32": ("<f4", TensorProto.FLOAT),
    "F16": ("<f2", TensorProto.FLOAT16),
}


def export_onnx(graphs: Graphs, name: str, example: dict[str, np.ndarray], folder: Path) -> None:
    """Write ``NAME.onnx`` into a folder that already holds ``model.safetensors``.

    Args:
        graphs: float32, on the CPU.
        name: of the graph.
        example: inputs with a batch of at least two; a batch of one would become a constant.
        folder: of the bundle.
    """
    inputs = inputs_of(name, graphs.levels)
    batch = torch.export.Dim("N")
    model = traced(
        Graph(graphs, name),
        {i: torch.from_numpy(example[i]) for i in inputs},
        outputs_of(name, graphs.levels),
        (tuple({0: batch} for _ in inputs),),
    )
    point_at_weights(model, folder / WEIGHTS_NAME)
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))


def export_encoder(
    network: nn.Module,
    images: np.ndarray,
    outputs: list[str],
    path: Path,
    data: dict[str, Any] | None = None,
) -> None:
    """Write an encoder as one file, for ``ade calibrate``.

    Args:
        network: float32, on the CPU, in evaluation mode; of uint8 ``(N, H, W, C)``.
        images: of that shape, two or more; what they show does not matter.
        outputs: names of what it gives.
        path: of the file.
        data: that it was trained on, as :func:`training.datasets.sketch.record_of` describes
            it, so that ``ade calibrate`` keeps its training images out of the calibration.
    """
    example = {"images": torch.from_numpy(images)}
    model = traced(network, example, outputs, ({0: torch.export.Dim("N")},))
    if data is not None:
        helper.set_model_props(model, {DATA_KEY: json.dumps(data)})
    onnx.checker.check_model(model)
    with replacing(path) as file:
        file.write(model.SerializeToString(deterministic=True))


def traced(
    module: nn.Module,
    inputs: dict[str, torch.Tensor],
    outputs: list[str],
    dynamic_shapes: tuple[Any, ...] | None,
) -> ModelProto:
    """A module as an ONNX model; all sizes are fixed if ``dynamic_shapes`` is ``None``."""
    with quiet_export():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
            custom_translation_table={torch.ops.aten.elu.default: _elu},
            optimize=True,
        )
    assert program is not None
    model = program.model_proto
    _strip(model)
    return model


def _elu(x: Any, alpha: float = 1.0) -> Any:
    """ELU, in operators that ONNX Runtime computes in half the time of its ``Elu`` on a CPU."""
    assert alpha == 1.0
    return op.Max(x, op.Sub(op.Exp(op.Clip(x, None, 0.0)), 1.0))


def _strip(model: ModelProto) -> None:
    """Remove traces of the exporting machine: source paths, stack traces and module names."""
    model.doc_string = ""
    model.producer_version = ""
    del model.metadata_props[:]
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        value.doc_string = ""
        del value.metadata_props[:]
    for node in [*model.graph.node, *(n for f in model.functions for n in f.node)]:
        node.doc_string = ""
        del node.metadata_props[:]


def point_at_weights(model: ModelProto, weights: Path) -> None:
    """Replace initialisers that are tensors of the file of weights by references into it.

    A tensor stored in half precision is cast, which ONNX Runtime does once, when it loads a graph.
    """
    stored: dict[tuple[bytes, tuple[int, ...]], tuple[int, int, int]] = {}
    with open(weights, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in STORED_TYPES:
            continue
        begin, end = entry["data_offsets"]
        dtype, kind = STORED_TYPES[entry["dtype"]]
        values = np.frombuffer(data[begin:end], dtype).astype("<f4").tobytes()
        stored[values, tuple(entry["shape"])] = kind, 8 + length + begin, end - begin
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        raw = numpy_helper.to_array(tensor).tobytes()
        found = stored.get((raw, tuple(tensor.dims)))
        if found is None:
            continue
        kind, offset, size = found
        for field in ("raw_data", "float_data"):
            tensor.ClearField(field)
        tensor.data_type = kind
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (
            ("location", weights.name),
            ("offset", str(offset)),
            ("length", str(size)),
        ):
            tensor.external_data.add(key=key, value=value)
        if kind != TensorProto.FLOAT:
            full, tensor.name = tensor.name, f"{tensor.name}_half"
            casts.append(helper.make_node("Cast", [tensor.name], [full], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
