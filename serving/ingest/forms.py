"""Checks forms before anything else reads them.

What then parses them may take far longer than they took to send, or find other parts in them.
"""

from __future__ import annotations

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ade_client.contract import MAX_IMAGES
from serving.ingest.errors import ApiError, malformed

MAX_FIELDS = 2 * MAX_IMAGES  # images, and more parameters than any operation has
MAX_NAME_BYTES = 4096  # of a field as it is sent, or of a part's header
MAX_SEMICOLONS = 32  # of a part's header, which takes long to parse with many
CHARSETS = (b"utf-8", b"us-ascii")
PLAIN = (b"binary", b"8bit", b"7bit")  # transfer encodings that change nothing


def multipart_names(content_type: str, body: bytes | bytearray) -> list[bytes]:
    """The names of a form's parts, in order.

    The form is whole: it ends with its boundary, and each part has a name and a single file or
    value, so that every parser finds the same parts.

    Args:
        content_type: of the body, ``multipart/form-data`` with a boundary.
        body: the complete body.

    Raises:
        ApiError: 400, it is not such a form; 413, it has too many fields.
    """
    names: list[bytes] = []
    num_parts = 0
    is_named: bool | None = None  # of a part, whose name is not read yet
    is_complete = False
    header, value = bytearray(), bytearray()

    def begin_part() -> None:
        nonlocal num_parts, is_named
        num_parts += 1
        is_named = None
        if num_parts > MAX_FIELDS:
            raise too_many_fields()

    def end_header() -> None:
        nonlocal is_named
        if b"\n" in value:  # other parsers begin a header there
            raise not_a_form()
        if max(len(header), len(value)) > MAX_NAME_BYTES:
            raise too_long_name()
        if value.count(b";") > MAX_SEMICOLONS:
            raise malformed(f"a header of a field may have at most {MAX_SEMICOLONS} semicolons")
        kind = header.lower()
        if kind == b"content-disposition":
            if is_named is not None:  # parsers differ in which of two they follow
                raise not_a_form()
            name = parse_options_header(bytes(value))[1].get(b"name")
            is_named = name is not None
            names.append(name or b"")
        elif kind == b"content-transfer-encoding" and value.strip().lower() not in PLAIN:
            # Some parsers decode it, others ignore it.
            raise malformed("a field of a form must not be encoded (Content-Transfer-Encoding)")
        elif kind == b"content-type" and b"multipart/" in value.lower():  # also behind a tab
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
    # Parsers differ in which of two they take, also if one is inside quotation marks.
    parameters = [one.strip().lower() for one in content_type.split(";")[1:]]
    if not boundary or sum(one.startswith("boundary") for one in parameters) != 1:
        raise not_a_form()
    line = b"--" + boundary
    # The parser takes far longer for boundaries, also for those that end no part, than for data.
    num_boundaries = body.startswith(line) + body.count(b"\n" + line) + body.count(b"\r" + line)
    if num_boundaries > MAX_FIELDS + 1:
        raise too_many_fields()
    # The same holds for spaces and tabs behind one. Other parsers drop what follows them.
    if any(body.startswith(line + one) or b"\n" + line + one in body for one in (b" ", b"\t")):
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
    # This parser takes a line that begins with the boundary for data if more is on it, or if the
    # line before ends with a line feed alone, or with a carriage return alone. Others begin a part
    # there, or drop what follows.
    if num_boundaries != num_parts + 1:
        raise not_a_form()
    closing = line + b"--"
    start = 0 if body.startswith(closing) else body.find(b"\r\n" + closing) + 2
    after = body[start + len(closing) :] if body.startswith(closing, start) else b""
    if not is_complete or after.strip():  # parts after the end would be ignored
        raise not_a_form()
    return names


def check_charset(content_type: str) -> None:
    """Refuse codecs with which Starlette would take minutes to read a text field.

    Raises:
        ApiError: 400.
    """
    charset = parse_options_header(content_type)[1].get(b"charset", b"utf-8")
    if charset.lower() not in CHARSETS:
        raise malformed("the charset of a form must be utf-8")


def not_a_form() -> ApiError:
    """400: the form cannot be parsed."""
    return malformed("the form cannot be parsed")


def too_long_name() -> ApiError:
    """400: a name is too long."""
    return malformed(
        f"a field's name, with its file's name, may have at most {MAX_NAME_BYTES} bytes"
    )


def too_many_fields() -> ApiError:
    """413: there are too many fields."""
    return ApiError(413, "too_many_images", f"a form may have at most {MAX_FIELDS} fields")
