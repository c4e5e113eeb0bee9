"""Checks forms before an engine reads them.

Parsers lose repeated fields, parts without a name, a part that is cut off and all but one of the
files in one field, and mistake an image under a form's content type for a malformed form.
"""

from __future__ import annotations

import logging
from urllib.parse import unquote_to_bytes

from ade_base.messages import show
from serving.ingest.errors import malformed
from serving.ingest.forms import (
    MAX_FIELDS,
    MAX_NAME_BYTES,
    multipart_names,
    not_a_form,
    too_long_name,
    too_many_fields,
)
from serving.ingest.requests import MULTIPART, URLENCODED

_FILE_START = 64  # every image format and .npy has a byte within these that no form has
_TEXT = bytes(range(32, 127)) + b"\r\n\t"


def quieten_parser() -> None:
    """Keep the parser from logging a warning for each invalid form."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


def checked_type(content_type: str, body: bytearray) -> str:
    """The content type under which a body is passed on; empty if the one given is not the body's.

    ``curl --data-binary``, ``wget --post-file`` and urllib declare every body a URL-encoded form.
    Such a form is ASCII text; anything else is a file that was sent as the body.

    Raises:
        ApiError: 400, a field is repeated or the form cannot be parsed; 413, it has too many
            fields.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == URLENCODED:
        start = body[:_FILE_START]
        if start.lstrip().startswith((b"{", b"[")):  # curl declares it a form
            raise malformed("a JSON body needs the header Content-Type: application/json")
        if start.translate(None, _TEXT):
            return ""
        _check_names(_urlencoded_names(body))
    elif kind == MULTIPART:
        _check_names(multipart_names(content_type, body))
    elif kind.startswith("multipart/"):  # multipart/mixed, for example
        raise not_a_form()
    return content_type


def _check_names(names: list[bytes]) -> None:
    seen: set[bytes] = set()
    for name in names:
        if name in seen:
            field = show(name.decode("utf-8", "replace"))
            cure = ": name further images image1, image2, …" if name.startswith(b"image") else ""
            raise malformed(f"the form has the field {field} more than once{cure}")
        seen.add(name)


def _urlencoded_names(body: bytearray) -> list[bytes]:
    if body.count(b"&") >= MAX_FIELDS:
        raise too_many_fields()
    form = bytes(body).strip(b"\r\n")
    if b"\r" in form or b"\n" in form:  # some parsers drop what follows
        raise malformed(
            "a URL-encoded form has no line breaks: write them as %0D%0A, and send JSON as "
            "application/json"
        )
    names = [pair.partition(b"=")[0] for pair in form.split(b"&")]
    if max(map(len, names)) > MAX_NAME_BYTES:  # it would take long to unquote
        raise too_long_name()
    return [unquote_to_bytes(name.replace(b"+", b" ")) for name in names if name]
