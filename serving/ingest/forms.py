"""Parses forms, and only those that every parser reads alike.

A form is parsed once, where its request is computed. Parsers lose repeated fields, parts without a
name, a part that is cut off and all but one of the files in one field, and some take far longer for
a form than it took to send. Such forms are refused, so that whatever checks a request on its way
sees the fields that are answered.
"""

from __future__ import annotations

import binascii
import logging
import re
from collections.abc import Iterable

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ade_base.messages import show
from ade_client.contract import MAX_IMAGES
from serving.ingest.errors import ApiError, malformed
from serving.ingest.requests import MULTIPART, URLENCODED, RawRequest

MAX_FIELDS = 2 * MAX_IMAGES  # images, and more parameters than any operation has
MAX_NAME_BYTES = 4096  # of a field as it is sent, or of a part's header
MAX_SEMICOLONS = 32  # of a part's header, which takes long to parse with many
CHARSETS = (b"utf-8", b"us-ascii")
PLAIN = (b"binary", b"8bit", b"7bit")  # transfer encodings that change nothing
_FILE_START = 64  # every image format and .npy has a byte within these that no form has
_TEXT = bytes(range(32, 127)) + b"\r\n\t"
_BAD_ESCAPE = re.compile(rb"%(?![0-9a-fA-F]{2})")
Body = bytes | bytearray


def quieten_parser() -> None:
    """Keep the parser from logging a warning for each invalid form."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


def raw_request(content_type: str, body: Body, probe: bool = False, id: str = "") -> RawRequest:
    """Make the request that :class:`serving.api.service.Service` takes.

    ``curl --data-binary``, ``wget --post-file`` and urllib declare every body a URL-encoded form.
    Such a form is ASCII text; anything else is a file that was sent as the body.

    Args:
        content_type: of the body, as sent.
        body: the complete body.
        probe, id: passed on.

    Raises:
        ApiError: 400, a form is not one that every parser reads alike; 413, it has too many fields.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == URLENCODED:
        start = body[:_FILE_START]
        if start.lstrip().startswith((b"{", b"[")):  # curl declares it a form
            raise malformed("a JSON body needs the header Content-Type: application/json")
        if start.translate(None, _TEXT):
            return RawRequest("", body, probe=probe, id=id)
        fields = _collect(_urlencoded(bytes(body)))
        # Without a value it is not a form, but perhaps text of another type.
        return RawRequest(content_type, None, fields if b"=" in body else {}, probe, id)
    if kind == MULTIPART:
        return RawRequest(content_type, None, _collect(multipart(content_type, body)), probe, id)
    if kind.startswith("multipart/"):  # multipart/mixed, for example
        raise not_a_form()
    return RawRequest(content_type, body, probe=probe, id=id)


def _collect(fields: Iterable[tuple[bytes, Body | memoryview]]) -> dict[str, bytes]:
    """Fields by name.

    Raises:
        ApiError: 400, a name is repeated, or is not UTF-8.
    """
    collected: dict[bytes, bytes] = {}
    for name, value in fields:
        if name in collected:
            field = show(name.decode("utf-8", "replace"))
            cure = ": name further images image1, image2, …" if name.startswith(b"image") else ""
            raise malformed(f"the form has the field {field} more than once{cure}")
        collected[name] = bytes(value)
    try:
        return {name.decode(): value for name, value in collected.items()}
    except UnicodeDecodeError:
        raise not_a_form() from None


def _urlencoded(body: bytes) -> Iterable[tuple[bytes, bytes]]:
    """Names and values of a URL-encoded form.

    Raises:
        ApiError: as :func:`raw_request`.
    """
    if body.count(b"&") >= MAX_FIELDS:
        raise too_many_fields()
    form = body.strip(b"\r\n")
    if b"\r" in form or b"\n" in form:  # some parsers drop what follows
        raise malformed(
            "a URL-encoded form has no line breaks: write them as %0D%0A, and send JSON as "
            "application/json"
        )
    if not form.isascii():
        raise malformed(
            f"a form of the type {URLENCODED} must be ASCII: to send a file as the body, give its "
            "type, such as Content-Type: application/octet-stream"
        )
    if _BAD_ESCAPE.search(form):
        raise not_a_form()
    for field in filter(None, form.split(b"&")):
        name, _, value = field.partition(b"=")
        if len(name) > MAX_NAME_BYTES:
            raise too_long_name()
        yield _unquoted(name), _unquoted(value)


def _unquoted(text: bytes) -> bytes:
    """Decode a name or a value, whose escapes are valid.

    As quoted-printable text, in which an escape begins with ``=``: ``urllib`` makes two objects of
    each escape, which takes a hundred times the memory.
    """
    return binascii.a2b_qp(text.replace(b"+", b" ").replace(b"=", b"=3D").replace(b"%", b"="))


class _Parts:
    """The parts of a form, as the parser finds them in one call with the whole body."""

    def __init__(self) -> None:
        self.count = 0
        self.is_complete = False
        self.fields: list[tuple[bytes, slice]] = []  # names, and where the values are in the body
        self._name: bytes | None = None
        self._value = slice(0, 0)
        self._header, self._text = bytearray(), bytearray()

    def begin(self) -> None:
        self.count += 1
        self._name, self._value = None, slice(0, 0)
        if self.count > MAX_FIELDS:
            raise too_many_fields()

    def header_name(self, data: Body, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: Body, start: int, end: int) -> None:
        self._text += data[start:end]

    def end_header(self) -> None:
        kind, value = bytes(self._header).lower(), bytes(self._text)
        self._header.clear()
        self._text.clear()
        if b"\n" in value:  # other parsers begin a header there
            raise not_a_form()
        if max(len(kind), len(value)) > MAX_NAME_BYTES:
            raise too_long_name()
        if value.count(b";") > MAX_SEMICOLONS:
            raise malformed(f"a header of a field may have at most {MAX_SEMICOLONS} semicolons")
        if kind == b"content-disposition":
            if self._name is not None:  # parsers differ in which of two they follow
                raise not_a_form()
            self._name = parse_options_header(value)[1].get(b"name")
            if self._name is None:
                raise not_a_form()
        elif kind == b"content-transfer-encoding" and value.strip().lower() not in PLAIN:
            # Some parsers decode it, others ignore it.
            raise malformed("a field of a form must not be encoded (Content-Transfer-Encoding)")
        elif kind == b"content-type" and b"multipart/" in value.lower():  # also behind a tab
            raise malformed(
                "a field of the form holds several files: name further images image1, image2, …"
            )

    def value(self, data: Body, start: int, end: int) -> None:
        self._value = slice(start, end)

    def end(self) -> None:
        if self._name is None:
            raise not_a_form()
        self.fields.append((self._name, self._value))

    def complete(self) -> None:
        self.is_complete = True


def multipart(content_type: str, body: Body) -> list[tuple[bytes, memoryview]]:
    """The names of a form's parts and their values, in order.

    The form is whole: it ends with its boundary, and each part has a name and a single file or
    value, so that every parser finds the same parts. Names may be repeated.

    Args:
        content_type: of the body, ``multipart/form-data`` with a boundary.
        body: the complete body.

    Raises:
        ApiError: 400, it is not such a form; 413, it has too many fields.
    """
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
    parts = _Parts()
    try:
        parser = MultipartParser(
            boundary,
            callbacks={
                "on_part_begin": parts.begin,
                "on_header_field": parts.header_name,
                "on_header_value": parts.header_value,
                "on_header_end": parts.end_header,
                "on_part_data": parts.value,
                "on_part_end": parts.end,
                "on_end": parts.complete,
            },
        )
        parser.write(body)  # type: ignore[arg-type]  # no copy: it takes any buffer
        parser.finalize()
    except (FormParserError, ValueError):
        raise not_a_form() from None
    # This parser takes a line that begins with the boundary for data if more is on it, or if the
    # line before ends with a line feed alone, or with a carriage return alone. Others begin a part
    # there, or drop what follows.
    if num_boundaries != parts.count + 1:
        raise not_a_form()
    closing = line + b"--"
    start = 0 if body.startswith(closing) else body.find(b"\r\n" + closing) + 2
    after = body[start + len(closing) :] if body.startswith(closing, start) else b""
    if not parts.is_complete or after.strip():  # parts after the end would be ignored
        raise not_a_form()
    view = memoryview(body)
    return [(name, view[where]) for name, where in parts.fields]


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
