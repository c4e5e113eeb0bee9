"""The API's reference as HTML, from its OpenAPI document: nothing is loaded from another host."""

from __future__ import annotations

from html import escape
from typing import Any

# Arguments for curl, by operation, which is the last part of a path.
BODIES = {
    "sample": "-H 'Content-Type: application/json' -d '{\"n\": 16, \"seed\": 7}' -o samples.png",
    "encode": "-F image=@image.png -F resize=fit -o latents.json",
    "reconstruct": "-F image=@image.png -F resize=fit -o reconstruction.png",
    "score": "-F image=@image.png -F resize=fit",
}


def reference(document: dict[str, Any], url: str) -> str:
    """Describe every operation: its purpose, parameters, answers, and a command.

    Args:
        document: as :func:`serving.api.openapi.openapi_document` makes it.
        url: of the service.
    """
    operations = "".join(
        _operation(url + path, item["post"]) for path, item in document["paths"].items()
    )
    token = (
        "<p>Every request needs the header <code>Authorization: Bearer …</code> with the "
        "service's token.</p>"
        if document.get("security")
        else ""
    )
    return (
        f'<section class="ade-part"><h2>API reference</h2>{token}<p>Parameters go into a JSON body '
        "or into the fields of a form. An error is a JSON object <code>error</code> with "
        "<code>code</code> and <code>message</code>.</p><p>The commands are for the service's own "
        f"machine; elsewhere, write its address instead of <code>{escape(url)}</code>.</p>"
        f"{operations}</section>"
    )


def _operation(address: str, operation: dict[str, Any]) -> str:
    name = operation["operationId"]
    content = operation.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    required = schema.get("required", [])
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code>{' <small>required</small>' * (key in required)}</td>"
        f"<td>{escape(_kind(value))}</td><td>{escape(value.get('description', ''))}</td></tr>"
        for key, value in schema.get("properties", {}).items()
    )
    table = (
        '<div class="ade-scroll" tabindex="0" role="region" '
        f'aria-label="Parameters of {escape(name)}"><table class="ade-table"><thead><tr>'
        f"<th>parameter</th><th>values</th><th>meaning</th></tr></thead><tbody>{rows}</tbody></table></div>"
        if rows
        else ""
    )
    answers = "".join(
        f"<li><b>{escape(status)}</b> {escape(answer['description'])}{_types(answer)}</li>"
        for status, answer in operation["responses"].items()
    )
    body = next((text for end, text in BODIES.items() if name.endswith(end)), "")
    return (
        f"<details><summary><code>POST /predictions/{escape(name)}</code> "
        f"{escape(operation['summary'])}</summary>"
        f"<pre tabindex=0><code>curl {escape(address)} {escape(body)}</code></pre>{table}"
        f"<p>Bodies: {_listed(content)}.</p><p>Answers:</p><ul>{answers}</ul></details>"
    )


def _types(answer: dict[str, Any]) -> str:
    content = answer.get("content", {})
    return f": {_listed(content)}" if content else ""


def _listed(content: dict[str, Any]) -> str:
    return ", ".join(f"<code>{escape(kind)}</code>" for kind in content)


def _kind(schema: dict[str, Any]) -> str:
    """The values of a parameter in a few words."""
    if "enum" in schema:
        kind = " | ".join(map(str, schema["enum"]))
    else:
        given = schema.get("type", "object")
        kind = " or ".join(given) if isinstance(given, list) else str(given)
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum")
    if low is not None and high is not None and high < 2**53:
        kind += f", {'above ' if 'exclusiveMinimum' in schema else ''}{low:g} to {high:g}"
    elif low is not None:
        kind += f", from {low:g}"
    if "default" in schema:
        kind += f", default {str(schema['default']).lower()}"
    return kind
