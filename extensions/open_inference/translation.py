"""Translates the Open Inference Protocol (V2) over HTTP to the API's requests and back.

Tensors are JSON or binary data.
https://github.com/kserve/open-inference-protocol, with Triton's extension for binary tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from ade_base.messages import show
from ade_client.contract import MAX_IMAGES
from handlers.limits import MAX_REQUEST_BYTES
from serving.api.operations.sample import json_limits
from serving.api.responses import Response, check_size, error_response
from serving.engine.bundle import Bundle
from serving.ingest.errors import ApiError, ProtocolError, internal_error, malformed, unusable
from serving.ingest.parameters import whole
from serving.ingest.requests import (
    JSON_BYTES_PER_NUMBER,
    MAX_JSON_VALUES,
    MULTIPART,
    JsonLimits,
    RawRequest,
    array_of,
    is_image_field,
    parse_json,
)

logger = logging.getLogger(__name__)
VERSION = "1"
MAX_DIMS = 8  # of a tensor
JSON_BYTES_PER_BYTE = 6  # of a UINT8 or a BOOL, with the comma
LENGTH_HEADER = "Inference-Header-Content-Length"
BINARY_TYPE = "application/octet-stream"
DATATYPES = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT64": np.dtype("<u8"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "torchscript": "pytorch_torchscript"}
IMAGES = "images"
SAMPLE_INPUTS = ("n", "seed")
# What a request may say, with what KServe's client adds. Others are refused: one of them may be
# `calibration`, in the wrong place.
REQUEST_KEYS = {"id", "inputs", "outputs", "parameters", "model_name", "model_version"}
# MLServer's clients say how they made an array, which changes nothing.
INPUT_PARAMETERS, OUTPUT_PARAMETERS = {"binary_data_size", "content_type"}, {"binary_data"}
# Parameters of the API whose answers the tensors of a score do not hold.
UNANSWERED = ("explain", "fdr", "map")
FORMATS = {"sample": "npy", "encode": "npz", "reconstruct": "npy", "score": "json"}  # of the API
Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Call:
    """The parts of a request that its answer depends on.

    Attributes:
        model: served name of the model.
        operation: operation of the model.
        id: the client's id of the request.
        outputs: requested tensors, and whether each is binary; all tensors if empty.
        is_binary: the default for outputs that do not specify it.
    """

    model: str
    operation: str
    id: str | None
    outputs: Mapping[str, bool]
    is_binary: bool


def metadata(name: str, operation: str, bundle: Bundle, backend: str) -> dict[str, Any]:
    """A model's inputs and outputs; -1 is the number of images."""
    images = _tensor(IMAGES, "UINT8", (-1, *bundle.image_shape))
    latents = [
        _tensor(f"{part}_{level}", "FP32", (-1, *shape))
        for part in ("mean", "log_scale", "z")
        for level, shape in enumerate(bundle.latent_shapes)
    ]
    outputs = {
        "sample": [images, _tensor("seed", "INT64", (1,))],
        "encode": latents,
        "reconstruct": [images, _tensor("psnr", "FP64", (-1,))],
        "score": [
            _tensor("bpd", "FP64", (-1,)),
            _tensor("p_value", "FP64", (-1,)),
            _tensor("accepted", "BOOL", (-1,)),
            _tensor("has_verdict", "BOOL", (-1,)),
        ],
    }
    takes = [_tensor(one, "INT64", (1,)) for one in SAMPLE_INPUTS]
    return {
        "name": name,
        "versions": [VERSION],
        "platform": _PLATFORMS.get(backend, backend),
        "inputs": takes if operation == "sample" else [images],
        "outputs": outputs[operation],
    }


def _tensor(name: str, datatype: str, shape: Sequence[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


def parse(
    model: str, operation: str, bundle: Bundle, body: bytes, length: int, probe: bool, id: str
) -> RawRequest:
    """Parse a request.

    Args:
        model, operation, bundle: the model that is addressed.
        body: JSON, followed by binary tensors.
        length: number of bytes of JSON.
        probe, id: see :class:`serving.ingest.requests.RawRequest`.

    Raises:
        ApiError: 400, or 422 for tensors and parameters that the model does not take.
    """
    head = _head(body[:length], operation, bundle)
    inputs = _inputs(head, memoryview(body)[length:])
    given = head.get("parameters") or {}
    outputs = head.get("outputs") or []
    if not isinstance(given, dict) or not isinstance(outputs, list):
        raise malformed("parameters must be an object, and outputs a list")
    if "calibration" in given and given["calibration"] is None:
        raise unusable("bad_parameter", "calibration must be a string, got null")
    parameters = {name: _text(value) for name, value in given.items() if value is not None}
    is_binary = parameters.pop("binary_data_output", "false") == "true"
    call = Call(
        model,
        operation,
        head["id"] if isinstance(head.get("id"), str) else None,
        {_name(one, OUTPUT_PARAMETERS): _is_binary(one, is_binary) for one in outputs},
        is_binary,
    )
    if "format" in parameters:
        raise unusable(
            "unknown_parameter", "format is not a parameter: the protocol has formats of its own"
        )
    for name in UNANSWERED if operation == "score" else ():
        if parameters.pop(name, "false").lower() != "false":
            raise unusable(
                "unknown_parameter",
                f"{name} is not a parameter here: no output would hold what it adds",
            )
    for name in filter(is_image_field, parameters):  # they would be taken for files of a form
        raise unusable("unknown_parameter", f"{show(name)} is not a parameter: images are inputs")
    fields: dict[str, Any] = {**parameters, "format": FORMATS[operation]}
    if operation == "score":
        fields["explain"] = "false"
    known = SAMPLE_INPUTS if operation == "sample" else (IMAGES,)
    for name, tensor in inputs.items():
        if name not in known:
            raise unusable("bad_array", f"{operation} has no input {show(name)}")
        field = name if operation == "sample" else "image"
        if field in fields:
            raise malformed(f"{field} is given as a parameter and as an input")
        if operation == "sample":
            if tensor.size != 1:
                raise unusable("bad_array", f"{name} must have one value, got {tensor.size}")
            fields[field] = str(tensor.item())
        else:
            out = io.BytesIO()
            np.save(out, tensor, allow_pickle=False)
            fields[field] = out.getvalue()
    translate = functools.partial(respond, call)
    return RawRequest(MULTIPART, None, fields, probe, id, translate=translate)


def _head(text: bytes, operation: str, bundle: Bundle) -> dict[str, Any]:
    height, width, channels = bundle.image_shape
    limits = JsonLimits(
        MAX_REQUEST_BYTES,
        MAX_JSON_VALUES + MAX_IMAGES * (1 + height + height * width),
        MAX_JSON_VALUES + MAX_IMAGES * height * width * channels,
    )
    if operation == "sample":
        limits = json_limits(bundle.latent_shapes)
    parse_json(text, "the request", limits)  # refuses keys that repeat
    try:
        head = orjson.loads(text)  # refuses numbers and text that an answer cannot hold
    except ValueError as error:
        raise malformed(f"the request is not JSON: {error}") from None
    if not isinstance(head, dict) or not isinstance(head.get("inputs"), list):
        raise malformed("the request must be a JSON object with a list of inputs")
    _only(REQUEST_KEYS, head, "the request")
    return head


def _only(known: Collection[str], given: Mapping[str, Any], what: str) -> None:
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise unusable(
            "unknown_parameter",
            f"{what} has no {show(unknown)}; it may have {', '.join(sorted(known))}",
        )


def _inputs(head: dict[str, Any], binary: memoryview) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for one in head["inputs"]:
        name = _name(one, INPUT_PARAMETERS)
        if name in found:
            raise malformed(f"there are several inputs {show(name)}: stack images into one")
        dtype = DATATYPES.get(str(one.get("datatype")))
        shape = one.get("shape")
        if dtype is None:
            raise unusable(
                "bad_array", f"{show(name)}: datatype must be one of {', '.join(DATATYPES)}"
            )
        if not _is_shape(shape):
            raise malformed(
                f"{show(name)}: shape must be a list of at most {MAX_DIMS} numbers from 0 to "
                f"{MAX_REQUEST_BYTES}"
            )
        size = (one.get("parameters") or {}).get("binary_data_size")
        if size is not None and "data" in one:
            raise malformed(f"{show(name)}: give data or binary_data_size, not both")
        if size is not None and not (type(size) is int and 0 <= size <= len(binary)):
            raise malformed(
                f"{show(name)}: binary_data_size must be a number of bytes, at most the "
                f"{len(binary)} that follow"
            )
        count = math.prod(shape)
        try:
            if size is None:
                flat = _exact(one.get("data"), dtype)
            else:
                flat, binary = np.frombuffer(binary[:size], dtype), binary[size:]
        except (ValueError, TypeError, OverflowError):
            raise malformed(
                f"{show(name)}: the data is not of the type {one['datatype']}"
            ) from None
        if flat.size != count:
            raise malformed(f"{show(name)}: shape {shape} has {count} values, got {flat.size}")
        try:
            found[name] = flat.reshape(shape)
        except ValueError:  # empty, and beside the 0 too large
            raise malformed(f"{show(name)}: no array can have this shape") from None
    if binary:
        raise malformed(f"the body has {len(binary)} bytes that belong to no input")
    return found


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) <= MAX_DIMS
        and all(type(size) is int and 0 <= size <= MAX_REQUEST_BYTES for size in shape)
    )


def _exact(data: Any, dtype: np.dtype) -> np.ndarray:
    """Convert numbers from JSON to a flat array.

    Raises:
        ValueError: the type cannot hold them.
    """
    given = array_of(data, of_booleans=dtype.kind == "b").reshape(-1)
    if dtype.kind in "iu" and given.dtype.kind == "f" and (np.abs(given) >= 2.0**63).any():
        raise ValueError("values would change")  # orjson reads larger integers as floats
    flat = given.astype(dtype)
    if dtype.kind != "f" and not np.array_equal(flat, given):
        raise ValueError("values would change")
    return flat


def _name(tensor: Any, known: Collection[str]) -> str:
    """The name of an input or output, whose own parameters are known."""
    if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
        raise malformed("inputs and outputs must be objects with a name")
    parameters = tensor.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise malformed("parameters must be an object")
    _only(known, parameters, f"parameters of the tensor {show(tensor['name'])}")
    return str(tensor["name"])


def _is_binary(output: dict[str, Any], default: bool) -> bool:
    return bool((output.get("parameters") or {}).get("binary_data", default))


def _text(value: Any) -> str:
    """The text of a parameter, as in a form.

    Raises:
        ApiError: 400, its lists are nested more deeply than orjson writes, though it reads them.
    """
    try:
        return value if isinstance(value, str) else orjson.dumps(whole(value)).decode()
    except TypeError:
        raise malformed("a parameter holds too deeply nested lists") from None


def respond(call: Call | None, response: Response) -> Response:
    """Translate the API's answer into the protocol.

    Args:
        call: of the request; ``None`` if it could not be parsed.
        response: the answer.
    """
    error = response.error
    if error is None:
        assert call is not None
        try:
            return _tensor_response(call, response)
        except ApiError as refusal:
            error = refusal
        except Exception:  # one answer must not take its batch along
            logger.exception("an answer could not be translated")
            error = internal_error()
    translated = error_response(ProtocolError.of(error))
    return dataclasses.replace(translated, headers=response.headers | translated.headers)


def _tensor_response(call: Call, response: Response) -> Response:
    """The requested tensors.

    Raises:
        ApiError: 422, there is no such output, or their JSON would be too long.
    """
    tensors = _tensors(call.operation, response)
    unknown = [name for name in call.outputs if name not in tensors]
    if unknown:
        raise unusable("bad_array", f"{call.operation} has no output {show(unknown[0])}")
    wanted = {name: call.outputs.get(name, call.is_binary) for name in call.outputs or tensors}
    check_size(
        sum(_json_bytes(tensors[name]) for name, is_binary in wanted.items() if not is_binary),
        "set binary_data_output",
    )
    outputs, binary = [], []
    for name, is_binary in wanted.items():
        tensor = np.ascontiguousarray(tensors[name])
        about = _tensor(name, _NAMES[tensor.dtype], tensor.shape)
        if is_binary:
            binary.append(tensor.tobytes())
            about["parameters"] = {"binary_data_size": tensor.nbytes}
        else:
            about["data"] = tensor.reshape(-1).tolist()
        outputs.append(about)
    head = {"model_name": call.model, "model_version": VERSION, "outputs": outputs}
    text = orjson.dumps(head if call.id is None else {**head, "id": call.id})
    if not binary:
        return Response(200, "application/json", text, response.headers)
    headers = {**response.headers, LENGTH_HEADER: str(len(text))}
    return Response(200, BINARY_TYPE, b"".join([text, *binary]), headers)


def _json_bytes(tensor: np.ndarray) -> int:
    """Upper bound of the length of a tensor's JSON."""
    return tensor.size * (JSON_BYTES_PER_BYTE if tensor.itemsize == 1 else JSON_BYTES_PER_NUMBER)


def _tensors(operation: str, response: Response) -> Tensors:
    if operation == "score":
        results = orjson.loads(response.body)["results"]
        return {
            "bpd": np.array([one.get("bpd") for one in results], np.float64),
            "p_value": np.array([one.get("p_value") for one in results], np.float64),
            "accepted": np.array([one.get("decision") == "accept" for one in results]),
            "has_verdict": np.array([type(one.get("ood")) is bool for one in results]),
        }
    stream = io.BytesIO(response.body)
    if operation == "encode":
        with np.load(stream) as arrays:
            return {name: arrays[name] for name in arrays.files if arrays[name].ndim == 4}
    images = np.load(stream)
    if operation == "sample":
        return {IMAGES: images, "seed": np.array([int(response.headers["X-Ade-Seed"])], np.int64)}
    psnr = [float(text) for text in response.headers["X-Ade-Psnr"].split(",")]
    return {IMAGES: images, "psnr": np.array(psnr, np.float64)}
