"""The contract as an OpenAPI 3.1 document, made from the table that requests are read by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.api.parameters import MAX_IMAGES, PARAMETERS
from serving.engine.bundle import Bundle
from serving.engine.signatures import OPERATIONS
from serving.verdict.statistics import part_names

JSON = "application/json"
IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif", "image/tiff")
# Beside these, docs/api.md lists what is answered before a request reaches an operation.
STATUSES = {
    "400": "the request cannot be taken apart",
    "413": "more than a request may have",
    "415": "not an image, or a damaged one",
    "422": "well formed and not usable",
    "503": "overloaded or stopping: come again after Retry-After seconds",
}
ABOUT = {
    "sample": "New images, or the images of given latents",
    "encode": "Latents of images",
    "reconstruct": "Images encoded and decoded, with their PSNR",
    "score": "Bits per dimension of images, and a calibrated verdict whether they belong",
}
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_NUMBER: dict[str, Any] = {"type": "number"}
_MAYBE: dict[str, Any] = {"type": ["number", "null"]}
_PNG: dict[str, Any] = {
    "type": "string",
    "contentEncoding": "base64",
    "contentMediaType": "image/png",
}
_PROBABILITY = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}


def openapi_document(url: str, bundles: Sequence[Bundle], needs_token: bool) -> dict[str, Any]:
    """The document of a service.

    Args:
        url: of its inference address.
        bundles: that it serves, the first under the plain names.
        needs_token: whether it asks for a token.
    """
    paths = {}
    for i, bundle in enumerate(bundles):
        for operation in OPERATIONS:
            name = operation if i == 0 else f"{bundle.name}-{operation}"
            paths[f"/predictions/{name}"] = {"post": _operation(name, operation, bundle)}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "AV-ADE",
            "version": "1",
            "description": "Samples, encodes, reconstructs and scores images.",
        },
        "servers": [{"url": url}],
        "paths": paths,
        "components": {
            "schemas": {
                "Error": _ERROR,
                "Problem": {
                    "type": "object",
                    "required": ["error"],
                    "additionalProperties": False,
                    "properties": {"error": {"$ref": "#/components/schemas/Error"}},
                },
            }
        },
    }
    if needs_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


_ERROR = {
    "type": "object",
    "required": ["code", "message"],
    "additionalProperties": False,
    "properties": {
        "code": {"type": "string"},
        "message": {"type": "string"},
        "index": {"type": "integer", "minimum": 0},
    },
}


def _operation(name: str, operation: str, bundle: Bundle) -> dict[str, Any]:
    problem = {"content": {JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    height, width, _ = bundle.image_shape
    about = f"{ABOUT[operation]}. {bundle.name}: {width} x {height} pixels."
    answers: dict[str, Any] = {
        "200": {"description": "the answer", "content": _answers(operation, bundle)}
    }
    if operation not in bundle.operations:
        about, answers = (
            f"{bundle.name} was trained without an inference network and can only sample: 422.",
            {},
        )
    return {
        "operationId": name,
        "summary": ABOUT[operation],
        "description": about,
        "requestBody": {"required": True, "content": _bodies(operation, bundle)},
        "responses": {
            **answers,
            **{status: {"description": words, **problem} for status, words in STATUSES.items()},
        },
    }


def _parameters(operation: str, bundle: Bundle) -> dict[str, Any]:
    found = {
        name: {
            **spec.kind.schema,
            "description": spec.about,
            **({} if spec.default is None else {"default": spec.default}),
        }
        for name, spec in PARAMETERS[operation].items()
    }
    if "kind" in found:
        found["kind"]["enum"] = list(bundle.kinds)
    return found


def _object(
    properties: dict[str, Any], required: Sequence[str], closed: bool = True
) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": not closed,
    }


def _bodies(operation: str, bundle: Bundle) -> dict[str, Any]:
    parameters = _parameters(operation, bundle)
    if operation == "sample":
        return {
            JSON: {"schema": _object(parameters, ())},
            "multipart/form-data": {"schema": _object(parameters, ())},
        }
    files = {
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_IMAGES,
        "items": {"type": "string", "contentEncoding": "base64", "description": "an image file"},
    }
    form = {
        "image": {
            "type": "string",
            "format": "binary",
            "description": "a file; further ones image1, image2, …",
        }
    }
    return {
        JSON: {"schema": _object({"images": files, **parameters}, ("images",))},
        "multipart/form-data": {"schema": _object({**form, **parameters}, ("image",))},
        "application/x-npy": _BINARY,
        **{kind: _BINARY for kind in IMAGE_TYPES},
    }


def _answers(operation: str, bundle: Bundle) -> dict[str, Any]:
    if operation == "sample":
        result = _object(
            {"image": _PNG, "seed": {"type": "integer"}, "index": {"type": "integer"}},
            ("image", "seed", "index"),
        )
        head = {"kind": {"type": "string"}, "seed": {"type": "integer"}, "temperature": _NUMBER}
        return {
            "image/png": _BINARY,
            "application/x-npy": _BINARY,
            JSON: _results(result, head, errors=False),
        }
    if operation == "encode":
        arrays = {name: {"type": "array"} for name in ("shape", "mean", "log_scale", "z")}
        level = _object({**arrays, "eps": {"type": "array"}}, tuple(arrays))
        result = _noted(
            {"levels": {"type": "array", "items": level, "minItems": len(bundle.latent_shapes)}},
            ("levels",),
        )
        return {JSON: _results(result, {}), "application/x-npz": _BINARY}
    if operation == "reconstruct":
        result = _noted({"image": _PNG, "psnr": _MAYBE}, ("image", "psnr"))
        return {
            "image/png": _BINARY,
            "application/x-npy": _BINARY,
            JSON: _results(result, {"kind": {"type": "string"}}),
        }
    parts = ("dequantization", *part_names(len(bundle.latent_shapes)))
    reason = _object(
        {"statistic": {"type": "string"}, "value": _NUMBER, "p_value": _PROBABILITY},
        ("statistic", "value", "p_value"),
    )
    verdict = {
        "ood_score": _MAYBE,
        "p_value": {**_PROBABILITY, "type": ["number", "null"]},
        "ood": {"type": ["boolean", "null"]},
    }
    decision = {
        "decision": {
            "enum": ["accept", "reject", "no_verdict"],
            "description": "accept where a calibrated verdict could have rejected",
        },
        "decision_reason": {
            "type": ["string", "null"],
            "description": "why there is no verdict, after a code",
        },
    }
    result = _noted(
        {
            "bpd": _NUMBER,
            "standard_error": _MAYBE,
            **verdict,
            "bpd_parts": _object({**{part: _NUMBER for part in parts}, "iwae_gap": _NUMBER}, parts),
            "discovery": {"type": ["boolean", "null"]},
            "explain": {"type": "array", "items": reason},
            "map": _object({"bits": {"type": "array"}, "png": _PNG}, ("bits", "png")),
            **decision,
        },
        ("bpd", "bpd_parts", "standard_error", *verdict, *decision),
    )
    head = {
        "estimator": {"type": "string", "pattern": "^(elbo|iwae-[0-9]+)$"},
        "samples": {"type": "integer"},
        "alpha": _NUMBER,
    }
    group = _object(
        {
            "images": {"type": "integer"},
            "p_value": _PROBABILITY,
            "fdr": _NUMBER,
            "discoveries": {"type": "integer"},
            "rejected": {"type": "integer"},
            "notes": {"type": "array", "items": {"type": "string"}},
        },
        ("images", "p_value"),
    )
    return {JSON: _results(result, head, optional={"group": group})}


def _noted(properties: dict[str, Any], required: Sequence[str]) -> dict[str, Any]:
    return _object(
        {**properties, "notes": {"type": "array", "items": {"type": "string"}}}, required
    )


def _results(
    result: dict[str, Any],
    head: dict[str, Any],
    errors: bool = True,
    optional: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One entry an image; of several images a bad one is an error in its place."""
    entry = {"anyOf": [result, {"$ref": "#/components/schemas/Problem"}]} if errors else result
    fixed = {
        "model": {"type": "string"},
        **head,
        "results": {"type": "array", "items": entry, "minItems": 1},
    }
    return {"schema": _object({**fixed, **(optional or {})}, tuple(fixed))}
