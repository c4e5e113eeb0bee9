"""Checks forms before an engine reads them.

Engines lose repeated fields, parts without a name, a part that is cut off and all but one of the
files in one field, and mistake an image under a form's content type for a malformed form.
"""

from __future__ import annotations

import logging
from urllib.parse import unquote_to_bytes

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serving.api.errors import ApiError, malformed
from serving.api.requests import MAX_IMAGES, MULTIPART, URLENCODED, is_type
from serving.messages import show

MAX_FIELDS = 2 * MAX_IMAGES  # images, and more parameters than any operation has
MAX_NAME_BYTES = 4096  # of a field as it is sent, or of a part's header
MAX_SEMICOLONS = 32  # of a part's header: the time to parse it grows with their square
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
    if is_type(content_type, URLENCODED):
        if body[:_FILE_START].translate(None, _TEXT):
            return ""
        _check_names(_urlencoded_names(body))
    elif is_type(content_type, MULTIPART):
        _check_names(_multipart_names(content_type, body))
    return content_type


def _check_names(names: list[bytes]) -> None:
    seen: set[bytes] = set()
    for name in names:
        if name in seen:
            field = show(name.decode("utf-8", "replace"))
            raise malformed(
                f"the form has the field {field} more than once: name further images image1, "
                "image2, …"
            )
        seen.add(name)


def _urlencoded_names(body: bytearray) -> list[bytes]:
    if body.count(b"&") >= MAX_FIELDS:
        raise _too_many()
    names = [pair.partition(b"=")[0] for pair in bytes(body).split(b"&")]
    if max(map(len, names)) > MAX_NAME_BYTES:  # it would take long to unquote
        raise _too_long()
    return [unquote_to_bytes(name.replace(b"+", b" ")) for name in names if name]


def _multipart_names(content_type: str, body: bytearray) -> list[bytes]:
    names: list[bytes] = []
    num_parts = 0
    is_named = is_complete = False
    header, value = bytearray(), bytearray()

    def begin_part() -> None:
        nonlocal num_parts, is_named
        num_parts += 1
        is_named = False
        if num_parts > MAX_FIELDS:
            raise _too_many()

    def end_header() -> None:
        nonlocal is_named
        if max(len(header), len(value)) > MAX_NAME_BYTES:
            raise _too_long()
        kind = header.lower()
        if kind == b"content-disposition":
            if value.count(b";") > MAX_SEMICOLONS:
                raise malformed(f"a header of a field may have at most {MAX_SEMICOLONS} semicolons")
            name = parse_options_header(bytes(value))[1].get(b"name")
            is_named = name is not None
            names.append(name or b"")
        elif kind == b"content-type" and value.lower().startswith(b"multipart/"):
            raise malformed(
                "a field of the form holds several files: name further images image1, image2, …"
            )
        header.clear()
        value.clear()

    def end_part() -> None:
        if not is_named:
            raise not_a_form()

    def end() -> None:
        nonlocal is_complete
        is_complete = True

    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise not_a_form()
    try:
        parser = MultipartParser(
            boundary,
            callbacks={
                "on_part_begin": begin_part,
                "on_header_field": lambda data, start, end: header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: value.extend(data[start:end]),
                "on_header_end": end_header,
                "on_part_end": end_part,
                "on_end": end,
            },
        )
        parser.write(body)  # type: ignore[arg-type]  # no copy: it takes any buffer
        parser.finalize()
    except (FormParserError, ValueError):
        raise not_a_form() from None
    last = body.find(b"\r\n--" + boundary + b"--")
    after = body[last + len(boundary) + 6 :] if last >= 0 else b""
    if not is_complete or after.strip():  # parts after the end would be ignored
        raise not_a_form()
    return names


def not_a_form() -> ApiError:
    return malformed("the form cannot be parsed")


def _too_long() -> ApiError:
    return malformed(
        f"a field's name, with its file's name, may have at most {MAX_NAME_BYTES} bytes"
    )


def _too_many() -> ApiError:
    return ApiError(413, "too_many_images", f"a form may have at most {MAX_FIELDS} fields")
