"""The contract as an OpenAPI 3.1 document, made from the models that requests are read by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ade_client.contract import MODEL_HEADER, Problem
from serving.api.operations.base import Operation
from serving.api.operations.registry import OPERATIONS
from serving.api.schema import BINARY, Schemas, obj
from serving.engine.bundle import Bundle
from serving.ingest.requests import JSON_TYPE, MULTIPART

_TEXT = {"type": "string"}
_RETRY = {
    "Retry-After": {
        "description": "seconds until the next try",
        "schema": {"type": "integer", "format": "int64", "minimum": 0},
    }
}
# Status, description and headers. docs/api.md lists the codes of each status.
ERRORS: dict[str, tuple[str, dict[str, Any]]] = {
    "400": ("the request cannot be parsed", {}),
    "401": (
        "the token is missing or wrong",
        {"WWW-Authenticate": {"description": "the scheme, Bearer", "schema": _TEXT}},
    ),
    "403": ("a web page of another origin sent the request", {}),
    "404": ("no model of this name, or no such path", {}),
    "405": (
        "the method is not allowed",
        {"Allow": {"description": "the methods that are allowed", "schema": _TEXT}},
    ),
    "408": ("the body arrived too slowly", {}),
    "412": (f"another model answers here than {MODEL_HEADER} names", {}),
    "413": ("the request exceeds a limit", {}),
    "415": ("not an image, or a damaged one", {}),
    "421": ("the service is not reached under this host name", {}),
    "422": ("well formed, but not usable", {}),
    "429": ("too many requests; answered by a proxy with rate limits", _RETRY),
    "431": ("the headers are too long", {}),
    "500": ("the service failed; its log has the reason", {}),
    "503": ("overloaded or stopping: try again after Retry-After seconds", _RETRY),
}
# Of every request of an operation.
PARAMETERS = [
    {
        "name": MODEL_HEADER,
        "in": "header",
        "description": "the only model that may answer: its name and weights' hash",
        "schema": _TEXT,
    }
]
# Headers of every answer of an operation.
HEADERS: dict[str, Any] = {
    MODEL_HEADER: {"description": "name and weights' hash", "schema": _TEXT},
    "X-Ade-Backend": {"description": "what computed the answer", "schema": _TEXT},
    "X-Ade-Batch": {
        "description": "images computed together",
        "schema": {"type": "integer", "format": "int64", "minimum": 0},
    },
    "Server-Timing": {"description": "milliseconds that the stages took", "schema": _TEXT},
    "X-Request-Id": {"description": "of the request in the logs", "schema": _TEXT},
}


def openapi_document(url: str, bundles: Sequence[Bundle], needs_token: bool) -> dict[str, Any]:
    """The document of a service.

    Args:
        url: of its inference address.
        bundles: that it serves, the first under the plain names.
        needs_token: whether it requires a token.
    """
    paths = {}
    components: dict[str, Any] = {}
    for i, bundle in enumerate(bundles):
        schemas = Schemas(components, bundle)
        for operation in OPERATIONS.values():
            name = operation.name if i == 0 else f"{bundle.name}-{operation.name}"
            paths[f"/predictions/{name}"] = {"post": _operation(name, operation, bundle, schemas)}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "AV-ADE",
            "version": "1",
            "description": "Samples, encodes, reconstructs and scores images. PUT does the same "
            "as POST.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": url}],
        "paths": paths,
        "components": {"schemas": components},
        "security": [],  # none, said explicitly: linters take its absence for an oversight
    }
    if needs_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def _operation(
    name: str, operation: Operation[Any, Any, Any], bundle: Bundle, schemas: Schemas
) -> dict[str, Any]:
    height, width, _ = bundle.image_shape
    if operation.name in bundle.operations:
        about = f"{operation.summary}. {bundle.name}: {width} x {height} pixels."
        answers = {"200": _answer(operation, schemas)}
    else:
        about = f"{bundle.name} was trained without an inference network and can only sample: 422."
        answers = {}
    problem = {JSON_TYPE: {"schema": schemas.reference(Problem)}}
    return {
        "operationId": name,
        "summary": operation.summary,
        "description": about,
        "parameters": PARAMETERS,
        "requestBody": {"required": True, "content": _bodies(operation, schemas)},
        "responses": {
            **answers,
            **{
                status: {
                    "description": description,
                    **({"headers": headers} if headers else {}),
                    "content": problem,
                }
                for status, (description, headers) in ERRORS.items()
            },
        },
    }


def _bodies(operation: Operation[Any, Any, Any], schemas: Schemas) -> dict[str, Any]:
    parameters = schemas.parameters(operation.fields)
    in_json, in_form = operation.json_body, operation.form_body
    as_text = {
        name: {
            "type": "string",
            "contentMediaType": JSON_TYPE,
            "description": f"JSON text: {schema['description']}",
        }
        for name, schema in parameters.items()
        if schema.get("type") == "array"  # in a form, clients would send a field for each element
    }
    form = obj({**in_form, **parameters, **as_text}, in_form)
    if operation.form_patterns:
        form["patternProperties"] = dict(operation.form_patterns)
    return {
        JSON_TYPE: {"schema": obj({**in_json, **parameters}, in_json)},
        MULTIPART: {"schema": form},
        **{media_type: {"schema": BINARY} for media_type in operation.binary_bodies},
    }


def _answer(operation: Operation[Any, Any, Any], schemas: Schemas) -> dict[str, Any]:
    return {
        "description": "the answer",
        "headers": {**HEADERS, **operation.headers},
        "content": {
            answer.media_type: {
                "schema": BINARY if answer.model is None else schemas.reference(answer.model)
            }
            for answer in operation.formats.values()
        },
    }
