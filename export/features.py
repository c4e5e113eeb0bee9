"""Turns any ONNX classifier or encoder into a bundle's ``features.onnx``.

The service knows nothing of layouts, sizes and normalisations: what comes before and after the
network becomes part of the graph, which takes uint8 ``images``, ``(N, H, W, C)`` of the model's
size, and gives ``features``, float32 ``(N, F)``, and of a classifier ``logits``, ``(N, K)``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ade_base.system import cpu_session
from export.feature_source import (
    CHECKED,
    DATA_KEY,
    FORMAT,
    SCALES,
    FeaturesError,
    FeatureSource,
)
from serving.engine.manifest import DATA, check_types
from serving.verdict.semantic import FEATURES, LOGITS
from training.datasets.sketch import KEY, sketch_in

LAYOUTS = ("nchw", "nhwc")
MIN_OPSET, OPSET = 11, 13  # older graphs are converted
TOLERANCE = 1e-3
_PREFIX = "ade_preprocessing_"
_PROBABILITIES = ("Softmax", "LogSoftmax", "Sigmoid")
_AFTER_LOGITS = (*_PROBABILITIES, "Identity", "Cast")
_SAME_VALUES = ("Identity", "Cast", "Reshape", "Flatten", "Squeeze")
_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "float",
    TensorProto.FLOAT16: "float16",
    TensorProto.UINT8: "uint8",
}


@dataclass(frozen=True)
class FeatureGraph:
    """A network with its preprocessing.

    Attributes:
        content: of ``features.onnx``.
        about: its entry in the manifest.
    """

    content: bytes
    about: dict[str, Any]


@dataclass(frozen=True)
class _Preprocessing:
    size: tuple[int, int]
    layout: str
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: str
    as_is: bool  # uint8 pixels, not scaled

    def __str__(self) -> str:
        height, width = self.size
        numbers = [" ".join(f"{v:g}" for v in values) for values in (self.mean, self.std)]
        scale = "uint8" if self.as_is else f"mean {numbers[0]}, std {numbers[1]}"
        return f"{height}x{width}, {self.layout}, {self.order}, {scale}"


def feature_graph(source: FeatureSource, images: np.ndarray) -> FeatureGraph:
    """Read a network and put its preprocessing in front of it.

    The layout, size and type of the input are read from the graph. A graph does not say how a float
    input is scaled: ``preprocess`` does, and it settles whatever else is unclear.

    Args:
        source: the network.
        images: uint8 ``(N, H, W, C)``, real images of the model's size, to try the graph on.

    Raises:
        FeaturesError: the graph cannot be read or used; the error names what is missing.
    """
    path = source.path
    model = _read(path)
    content = path.read_bytes()
    about_data = _data(model)
    _free_own_names(model.graph)
    found = _preprocessing(model.graph, images.shape[1:], source.preprocess)
    names = _outputs(model.graph, source.output)
    _prepend(model.graph, found, images.shape[1:])
    tried = _run(model, list(names.values()), images)
    if LOGITS in names and tried[names[LOGITS]].shape[1:] == (1,):
        del names[LOGITS]  # of one class: the energy would be that logit itself
    _append(model.graph, names, {name: tried[source] for name, source in names.items()}, found)
    result = _run(model, list(names), images)
    _check(model, result, images)
    features = result[FEATURES]
    about = {
        "source": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "preprocessing": str(found),
        "features": int(features.shape[1]),
        "classes": int(result[LOGITS].shape[1]) if LOGITS in result else 0,
        **({} if about_data is None else {"data": about_data}),
    }
    return FeatureGraph(model.SerializeToString(deterministic=True), about)


def check_source(source: FeatureSource, image_shape: tuple[int, ...]) -> None:
    """Check what needs no images, because reading them may take long.

    Args:
        source: the network.
        image_shape: ``(H, W, C)`` of the model.

    Raises:
        FeaturesError: the graph cannot be read or used; the error names what is missing.
    """
    graph = _read(source.path).graph
    _preprocessing(graph, image_shape, source.preprocess)
    _outputs(graph, source.output)


def data_of(path: Path) -> dict[str, Any] | None:
    """What a network was trained on, as :func:`training.datasets.sketch.record_of` describes it.

    :func:`export.to_onnx.export_encoder` writes it. ``None`` if unknown.

    Raises:
        FeaturesError: the graph cannot be read.
    """
    return _data(_read(path))


def _read(path: Path) -> ModelProto:
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        raise FeaturesError(f"{path} is not a usable ONNX graph: it is not a regular file")
    try:
        model = onnx.load(str(path))
        if _opset(model) < MIN_OPSET:
            model = onnx.version_converter.convert_version(model, OPSET)
    except (ValueError, DecodeError, onnx.checker.ValidationError, RuntimeError) as error:
        raise FeaturesError(f"{path} is not a usable ONNX graph: {error}") from error
    return model


def _data(model: ModelProto) -> dict[str, Any] | None:
    for entry in model.metadata_props:
        if entry.key == DATA_KEY:
            with suppress(ValueError, TypeError, RecursionError):
                found: dict[str, Any] = json.loads(entry.value)
                if isinstance(found, dict) and sketch_in(found) is None:
                    found.pop(KEY, None)  # it is damaged: the name remains
                check_types(found, DATA, DATA_KEY)
                return found
    return None  # or an entry of this name is another program's


def _opset(model: ModelProto) -> int:
    versions = [e.version for e in model.opset_import if e.domain in ("", "ai.onnx")]
    if not versions:
        raise FeaturesError("the graph imports no operators of ONNX: is it an ONNX file at all?")
    return int(max(versions))


def _input(graph: GraphProto) -> onnx.ValueInfoProto:
    constants = {tensor.name for tensor in graph.initializer}
    inputs: list[onnx.ValueInfoProto] = [
        value for value in graph.input if value.name not in constants
    ]
    if len(inputs) != 1:
        raise FeaturesError(
            f"the graph must have one input, got {', '.join(v.name for v in inputs) or 'none'}"
        )
    return inputs[0]


def _preprocessing(
    graph: GraphProto, image_shape: tuple[int, ...], text: str | None
) -> _Preprocessing:
    given = _parse(text)
    value = _input(graph)
    tensor = value.type.tensor_type
    if tensor.elem_type not in _TYPES:
        raise FeaturesError(f"input {value.name} must be of {', '.join(_TYPES.values())}")
    dims = [dim.dim_value or None for dim in tensor.shape.dim]
    if len(dims) != 4:
        raise FeaturesError(f"input {value.name} must have four dimensions, got {len(dims)}")
    if dims[0] not in (None, 1):
        raise FeaturesError(
            f"input {value.name} has a fixed batch of {dims[0]}: export it with a dynamic batch "
            "dimension"
        )
    wanted = {image_shape[2], 3}
    layouts = {"nchw": dims[1], "nhwc": dims[3]}
    layout = given.get("layout") or next((k for k in LAYOUTS if layouts[k] in wanted), None)
    if layout is None:
        raise FeaturesError(
            f"the layout of input {value.name}, {dims}, is unclear: give layout=nchw or layout=nhwc"
        )
    channels = layouts[layout] or image_shape[2]
    if channels != image_shape[2] and image_shape[2] != 1:
        raise FeaturesError(f"the network takes {channels} channels, the model {image_shape[2]}")
    height, width = dims[2:] if layout == "nchw" else dims[1:3]
    own = (height or image_shape[0], width or image_shape[1])
    size = (int(given["size"]),) * 2 if "size" in given else own
    if (height or size[0], width or size[1]) != size:
        raise FeaturesError(f"the network takes {height}x{width} pixels, not size={given['size']}")
    as_is = tensor.elem_type == TensorProto.UINT8
    if as_is and given.get("scale", "raw") != "raw":
        raise FeaturesError(
            f"input {value.name} is of uint8 and takes pixels as they are: leave out "
            f"scale={given['scale']}"
        )
    if not as_is and "scale" not in given:
        raise FeaturesError(
            f"a graph with an input of {_TYPES[tensor.elem_type]} does not say how pixels are "
            f"scaled: give the preprocessing scale=SCALE, SCALE one of {', '.join(SCALES)} or "
            "mean/std by channel"
        )
    mean, std = ((0.0,), (1.0,)) if as_is else _scale(given["scale"], channels)
    return _Preprocessing(size, layout, channels, mean, std, given.get("order", "rgb"), as_is)


def _parse(text: str | None) -> dict[str, str]:
    given = {}
    for item in (text or "").split(",") if text else ():
        key, _, value = item.partition("=")
        given[key.strip()] = value.strip()
    choices = {"layout": LAYOUTS, "order": ("rgb", "bgr")}
    wrong = [
        f"{key}={value}"
        for key, value in given.items()
        if key not in ("scale", "size", *choices)
        or value not in choices.get(key, (value,))
        or (key == "size" and not (value.isdecimal() and int(value)))
    ]
    if wrong:
        raise FeaturesError(f"the preprocessing must be {FORMAT}, got {', '.join(wrong)}")
    return given


def _scale(text: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        mean, std = SCALES.get(text) or (
            tuple(float(v) for v in part.split()) for part in text.split("/")
        )
    except ValueError:
        mean, std = (), ()
    if {len(mean), len(std)} - {1, channels} or not all(v > 0 for v in std):
        raise FeaturesError(
            f"scale must be one of {', '.join(SCALES)}, or mean/std of {channels} channels such as "
            f"'0.5 0.5 0.5/0.25 0.25 0.25', got {text!r}"
        )
    return mean, std


def _producers(graph: GraphProto) -> dict[str, NodeProto]:
    return {name: node for node in graph.node for name in node.output}


def _outputs(graph: GraphProto, output: str | None) -> dict[str, str]:
    """Find the graph's values that are the features and, if there are any, the logits."""
    producers = _producers(graph)
    ends = [value.name for value in graph.output]
    if output is None and FEATURES in ends:
        return {name: name for name in (FEATURES, LOGITS) if name in ends}
    if output is not None and output not in producers:
        raise FeaturesError(f"the graph has no value {output!r}; its outputs are {', '.join(ends)}")
    linear = [found for end in ends if (found := _linear(graph, producers, end)) is not None]
    linear = [found for found in linear if output is None or found[1] != output]
    if output is None and len(ends) > 1:
        raise FeaturesError(f"give the features' output, one of {', '.join(ends)} or any value")
    if output is None and not linear:
        activation = _activation(producers, ends[0])
        if activation is not None:
            raise FeaturesError(
                f"the only output, {ends[0]}, comes from {activation}, so it holds probabilities: "
                "give the value that holds the features, by the option features-output"
            )
        return {FEATURES: ends[0]}
    features = output or linear[0][0]
    logits = [found for _, found in linear if found is not None]
    return {FEATURES: features, **({LOGITS: logits[0]} if logits else {})}


def _activation(producers: dict[str, NodeProto], name: str) -> str | None:
    """The operator, if it makes probabilities, that an output comes from."""
    node = producers.get(name)
    while node is not None and node.op_type in _SAME_VALUES:
        node = producers.get(node.input[0])
    return node.op_type if node is not None and node.op_type in _PROBABILITIES else None


def _linear(
    graph: GraphProto, producers: dict[str, NodeProto], name: str
) -> tuple[str, str | None] | None:
    """Find the input and the logits of the last linear layer before an output or its softmax.

    A sigmoid makes a probability of each logit by itself, so these are not logits of classes of
    which an image has one: the logits are ``None``.
    """
    constants = {tensor.name for tensor in graph.initializer}
    node = producers.get(name)
    of_classes = True
    while node is not None and node.op_type in _AFTER_LOGITS:
        of_classes &= node.op_type != "Sigmoid"
        name = node.input[0]
        node = producers.get(name)
    if node is not None and node.op_type == "Add":
        factors = [i for i in node.input if i not in constants]
        node = producers.get(factors[0]) if len(factors) == 1 else None
    if node is None or node.op_type not in ("Gemm", "MatMul"):
        return None
    if node.input[1] not in constants | set(producers):
        return None
    return node.input[0], name if of_classes else None


def _prepend(graph: GraphProto, found: _Preprocessing, image_shape: tuple[int, ...]) -> None:
    """Put nodes in front that turn uint8 ``images`` into the network's input."""
    value = _input(graph)
    name, elem_type = value.name, value.type.tensor_type.elem_type
    nodes: list[NodeProto] = []
    here = "images"

    def then(op: str, *constants: np.ndarray, skip: int = 0, **attributes: Any) -> None:
        nonlocal here
        inputs = [here, *[""] * skip]
        for constant in constants:
            inputs.append(f"{_PREFIX}constant_{len(graph.initializer)}")
            graph.initializer.append(numpy_helper.from_array(constant, inputs[-1]))
        there = f"{_PREFIX}{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [there], **attributes))
        here = there

    _rename(graph, "images", f"{_PREFIX}other_images")
    name = f"{_PREFIX}other_images" if name == "images" else name
    resized = found.size != tuple(image_shape[:2])
    if not found.as_is or resized:
        then("Cast", to=TensorProto.FLOAT)
    then("Transpose", perm=[0, 3, 1, 2])
    if found.channels != image_shape[2]:
        then("Concat", axis=1)
        nodes[-1].input.extend([nodes[-1].input[0]] * (found.channels - 1))
    if found.order == "bgr":
        then("Gather", np.arange(found.channels)[::-1].copy(), axis=1)
    if resized:
        factors = np.array([1, 1, *np.divide(found.size, image_shape[:2])])
        scales = factors.astype(np.float32)
        # Resize rounds sizes down: a scale that is too small by a digit would lose a pixel.
        scales = np.where(scales < factors, np.nextafter(scales, np.float32(np.inf)), scales)
        then(
            "Resize",
            scales,
            skip=1,
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        )
    if not found.as_is:
        mean, std = (
            np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (found.mean, found.std)
        )
        then("Sub", 255 * mean)
        then("Div", 255 * std)
    if found.layout == "nhwc":
        then("Transpose", perm=[0, 2, 3, 1])
    if elem_type != (TensorProto.UINT8 if found.as_is and not resized else TensorProto.FLOAT):
        if elem_type == TensorProto.UINT8:  # a cast truncates
            then("Round")
        then("Cast", to=elem_type)
    nodes[-1].output[0] = name
    if len({n.op_type for n in nodes}) == 1 and found.layout == "nhwc":  # two transpositions cancel
        nodes = []
        _rename(graph, name, "images")
    graph.input.remove(value)
    graph.input.insert(
        0, helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", *image_shape])
    )
    kept = list(graph.node)
    del graph.node[:], graph.value_info[:]
    graph.node.extend([*nodes, *kept])


def _free_own_names(graph: GraphProto) -> None:
    """Rename what an earlier call added: the graph may be the ``features.onnx`` of a bundle."""
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    names |= {tensor.name for tensor in graph.initializer}
    for name in sorted(names):
        if name.startswith(_PREFIX):
            new = f"earlier_{name}"
            while new in names:
                new = f"earlier_{new}"
            _rename(graph, name, new)


def _rename(graph: GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new
    for value in (*graph.input, *graph.output, *graph.initializer):
        if value.name == old:
            value.name = new


def _append(
    graph: GraphProto,
    names: dict[str, str],
    tried: Mapping[str, np.ndarray],
    preprocessing: _Preprocessing,
) -> None:
    """Add nodes that turn the network's values into the outputs ``features`` and ``logits``.

    Args:
        graph: of the network.
        names: of these values, by the output.
        tried: what they were for some images, by the output.
        preprocessing: of the network.
    """
    del graph.output[:]
    for name in names:
        source = names[name]
        rank, is_cast = tried[name].ndim, tried[name].dtype != np.float32
        if rank not in ((2, 4) if name == FEATURES else (2,)):
            raise FeaturesError(
                f"{source} has {rank} dimensions: features must be (N, F) or (N, F, H, W), logits "
                "(N, K)"
            )
        channels_last = rank == 4 and _channels_last(source, tried[name].shape, preprocessing)
        if source != name or rank == 4 or is_cast:
            other = f"{_PREFIX}other_{name}"
            _rename(graph, name, other)
            names.update({key: other for key, value in names.items() if value == name})
            source = names[name]
            if rank == 4:
                if channels_last:
                    maps = f"{_PREFIX}maps"
                    graph.node.append(
                        helper.make_node("Transpose", [source], [maps], perm=[0, 3, 1, 2])
                    )
                    source = maps
                pooled, flat = f"{_PREFIX}pooled", f"{_PREFIX}flat"
                graph.node.append(helper.make_node("GlobalAveragePool", [source], [pooled]))
                graph.node.append(helper.make_node("Flatten", [pooled], [flat], axis=1))
                source = flat
            graph.node.append(helper.make_node("Cast", [source], [name], to=TensorProto.FLOAT))
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


def _channels_last(name: str, shape: tuple[int, ...], network: _Preprocessing) -> bool:
    """Whether maps are ``(N, H, W, F)``; of square images they are square.

    The layout of the input alone does not tell: converters often change it inside a graph.

    Raises:
        FeaturesError: it cannot be told.
    """
    _, first, second, third = shape
    is_square = network.size[0] == network.size[1]
    if is_square and first == second != third:
        return True
    if network.layout == "nchw" or is_square and first != second == third:
        return False
    raise FeaturesError(
        f"{name}, of shape (N, {first}, {second}, {third}), may be (N, F, H, W) or (N, H, W, F): "
        "let the graph average its maps over height and width, so that the features are (N, F)"
    )


def _run(model: ModelProto, names: list[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """Values of the graph for some images, whether they are its outputs or not."""
    trial = ModelProto()
    trial.CopyFrom(model)
    outputs = {value.name for value in trial.graph.output}
    trial.graph.output.extend(
        helper.make_empty_tensor_value_info(name) for name in names if name not in outputs
    )
    try:
        session = cpu_session(trial.SerializeToString())
        return dict(zip(names, session.run(names, {"images": images[:CHECKED]}), strict=True))
    except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
        raise FeaturesError(
            f"the network cannot be run on {min(CHECKED, len(images))} images at once: {error}"
        ) from error


def _check(model: ModelProto, result: dict[str, np.ndarray], images: np.ndarray) -> None:
    """Check that features of real images are finite, vary, and do not depend on the batch."""
    for name, values in result.items():
        if values.dtype != np.float32 or values.ndim != 2 or len(values) != len(images[:CHECKED]):
            raise FeaturesError(f"{name} must be float32 (N, F), got {values.dtype} {values.shape}")
        if name == FEATURES and values.shape[1] < 2:
            raise FeaturesError(
                f"features must have at least 2 values, got {values.shape[1]}: give another value "
                "of the graph, by the option features-output"
            )
        if not np.isfinite(values).all():
            raise FeaturesError(f"{name} of real images are not finite: is the scale right?")
        if len(values) > 1 and (values == values[:1]).all():
            raise FeaturesError(f"{name} of different images are the same: is the scale right?")
        alone = np.concatenate(
            [_run(model, [name], image[None])[name] for image in images[:CHECKED]]
        )
        size = np.abs(values).max() + 1e-6
        if np.abs(alone - values).max() > TOLERANCE * size:
            raise FeaturesError(f"{name} of an image depend on the others of its batch")
