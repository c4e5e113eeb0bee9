"""The operations of the HTTP API in Markdown, made from the OpenAPI document."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from serving.api.openapi import openapi_document
from serving.engine.bundle import open_bundle

ROOT = Path(__file__).resolve().parents[2]
URL = "http://127.0.0.1:8080"
JSON, FORM = "application/json", "multipart/form-data"
CAT = "-F image=@serving/examples/cat.png"
# The options of curl, and the recorded answer to such a request.
EXAMPLES = {
    "sample": ("""--json '{"n": 2, "seed": 7, "format": "json"}'""", "sample: json"),
    "encode": ("-T serving/examples/cat.png", "encode: json"),
    "reconstruct": (f"{CAT} -F format=json", "reconstruct: one as json"),
    "score": ("-T serving/examples/cat.png", "score: file"),
}


def operations() -> str:
    """Every operation with its fields and an example, the errors and the types."""
    document = openapi_document(URL, [open_bundle(ROOT / "pretrained" / "cifar10")], False)
    answers = json.loads((ROOT / "tests" / "data" / "contract.json").read_text())["answers"]
    posts = {path: methods["post"] for path, methods in document["paths"].items()}
    parts = []
    for path, post in posts.items():
        options, name = EXAMPLES[post["operationId"]]
        parts.append(_operation(path, post, options, answers[name]["body"]))
    responses = {
        status: answer for post in posts.values() for status, answer in post["responses"].items()
    }
    errors = {status: answer for status, answer in responses.items() if status != "200"}
    parts += [
        "## Errors",
        "Every error has the body [Problem](#problem).",
        _errors(errors),
        "## Types",
    ]
    for name, schema in document["components"]["schemas"].items():
        parts += [f"### {name}", _fields(schema["properties"], schema["required"])]
    return "\n\n".join(parts)


def _operation(path: str, post: dict[str, Any], options: str, answer: dict[str, Any]) -> str:
    bodies = {kind: body["schema"] for kind, body in post["requestBody"]["content"].items()}
    files = ", ".join(f"`{kind}`" for kind in bodies if kind not in (JSON, FORM))
    ok = post["responses"]["200"]
    kinds = [f"`{kind}` ({_type(body['schema'])})" for kind, body in ok["content"].items()]
    headers = [f"`{name}` ({about['description']})" for name, about in ok["headers"].items()]
    fields = {**bodies[JSON]["properties"], **bodies[FORM]["properties"]}
    own = {}  # the fields of images, which differ
    for kind, place in ((JSON, "JSON"), (FORM, "a form")):
        for name in bodies[kind]["required"]:
            field = fields.pop(name)
            about = field.get("description", field.get("items", {}).get("description"))
            own[name] = {**field, "description": f"required in {place}: {about}"}
    return "\n\n".join(
        [
            f"## {post['operationId']}",
            f"`POST {path}`: {post['summary']}.",
            f"The body is `{JSON}` or `{FORM}`" + (f", or one file: {files}." if files else "."),
            _fields({**own, **fields}, {*own, *fields}),
            f"The answer is {' or '.join(kinds)}, with the headers {', '.join(headers)}.",
            f"```bash\ncurl {URL}{path} {options}\n```",
            f"```json\n{_short(answer)}\n```",
        ]
    )


def _fields(fields: dict[str, Any], required: Collection[str]) -> str:
    rows = ["| field | type, limits, default | meaning |", "|---|---|---|"]
    for name, field in fields.items():
        kind = _type(field) + ("" if name in required else "; optional")
        if "default" in field:
            value = field["default"]
            kind += f"; default `{value if isinstance(value, str) else json.dumps(value)}`"
        rows.append(f"| `{name}` | {kind} | {field.get('description', '')} |")
    return "\n".join(rows)


def _errors(responses: dict[str, Any]) -> str:
    rows = ["| status | when | headers |", "|---|---|---|"]
    for status, answer in sorted(responses.items()):
        headers = ", ".join(f"`{name}`" for name in answer.get("headers", ()))
        rows.append(f"| {status} | {answer['description']} | {headers} |")
    return "\n".join(rows)


def _type(schema: dict[str, Any]) -> str:
    """A schema in words, such as ``integer, 1 to 64``."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return _list(schema)
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    text = "base64" if "contentEncoding" in schema else " or ".join(kinds)
    if schema.get("format") == "binary":
        return "file"
    if "exclusiveMinimum" in schema:
        return f"{text}, above {schema['exclusiveMinimum']:g} and at most {schema['maximum']:g}"
    if "maximum" in schema:
        last = "2⁶³ − 1" if schema["maximum"] == 2**63 - 1 else schema["maximum"]
        return f"{text}, {schema['minimum']} to {last}"
    return text


def _list(schema: dict[str, Any]) -> str:
    depth, item = 1, schema["items"]
    while item.get("type") == "array":
        depth, item = depth + 1, item["items"]
    if depth > 1:
        return f"{depth}-dimensional list of {_type(item)}s"
    low, high = schema.get("minItems"), schema.get("maxItems")
    count = "" if high is None else f", {high}" if high == low else f", {low} to {high}"
    return f"list of {_type(item)}{count}"


def _short(answer: dict[str, Any]) -> str:
    """An answer in JSON with short lists, and without the contents of arrays and pictures."""

    def shortened(value: Any) -> Any:
        if isinstance(value, list):
            return [*map(shortened, value[:3]), *(["…"] if len(value) > 3 else [])]
        if isinstance(value, dict):
            return "…" if "dtype" in value else {k: shortened(item) for k, item in value.items()}
        return value

    text = json.dumps(shortened(answer), indent=2, ensure_ascii=False)
    # Lists and objects without others on a line each.
    return re.sub(
        r"(?<=[\[{])\s+([^\[\]{}]*?)\s+(?=[]}])", lambda m: re.sub(r"\s*\n\s*", " ", m[1]), text
    )


def add_operations(app: Any, page: str, source: list[str]) -> None:
    if page == "reference/http":
        source[0] = source[0].replace("<!-- operations -->", operations())


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", add_operations)
    return {"parallel_read_safe": True}
