"""Parses HTTP bodies, especially forms, into :class:`serving.ingest.requests.RawRequest`."""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serving.ingest.errors import malformed
from serving.ingest.forms import not_a_form
from serving.ingest.requests import MULTIPART, URLENCODED, RawRequest, is_type

_BAD_ESCAPE = re.compile(rb"%(?![0-9a-fA-F]{2})")


def raw_request(content_type: str, body: bytes, probe: bool, id: str) -> RawRequest:
    """Make the request that :class:`serving.api.service.Service` takes.

    Args:
        content_type: of the body, which :func:`handlers.front.forms.checked_type` has checked.
        body: the complete body.
        probe, id: passed on.

    Raises:
        ApiError: 400, a form cannot be parsed.
    """
    if is_type(content_type, URLENCODED):
        return RawRequest(content_type, None, _collect(_urlencoded(body)), probe, id)
    if is_type(content_type, MULTIPART):
        return RawRequest(content_type, None, _collect(_multipart(content_type, body)), probe, id)
    return RawRequest(content_type, body, probe=probe, id=id)


def _collect(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, bytes]:
    """Fields by name."""
    try:
        return {name.decode(): value for name, value in pairs}
    except UnicodeDecodeError:
        raise not_a_form() from None


def _urlencoded(body: bytes) -> Iterable[tuple[bytes, bytes]]:
    if not body.isascii():
        raise malformed(
            f"a form of the type {URLENCODED} must be ASCII: to send a file as the body, give its "
            "type, such as Content-Type: application/octet-stream"
        )
    if _BAD_ESCAPE.search(body):
        raise not_a_form()
    if b"=" not in body:  # not a field: JSON without its type
        return
    for pair in filter(None, body.strip(b"\r\n").split(b"&")):
        name, _, value = pair.partition(b"=")
        yield _unquoted(name), _unquoted(value)


def _unquoted(text: bytes) -> bytes:
    """Decode a name or a value, whose escapes are valid.

    As quoted-printable text, in which an escape begins with ``=``: ``urllib`` makes two objects of
    each escape, which takes a hundred times the memory.
    """
    return binascii.a2b_qp(text.replace(b"+", b" ").replace(b"=", b"=3D").replace(b"%", b"="))


def _multipart(content_type: str, body: bytes) -> list[tuple[bytes, bytes]]:
    parts = _Parts()
    try:
        boundary = parse_options_header(content_type)[1][b"boundary"]
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except (FormParserError, KeyError, ValueError):
        raise not_a_form() from None
    if not parts.is_complete:
        raise not_a_form()
    return parts.fields


class _Parts:
    """The parts of a form, as the parser finds them."""

    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes]] = []
        self.is_complete = False
        self._name: bytes | None = None
        self._header: list[bytes] = [b"", b""]
        self._data: list[bytes] = []

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, first, end: self._extend(0, data[first:end]),
            "on_header_value": lambda data, first, end: self._extend(1, data[first:end]),
            "on_header_end": self._end_header,
            "on_part_data": lambda data, first, end: self._data.append(bytes(data[first:end])),
            "on_part_end": self._end,
            "on_end": self._complete,
        }

    def _begin(self) -> None:
        self._name, self._header, self._data = None, [b"", b""], []

    def _extend(self, which: int, data: bytes) -> None:
        self._header[which] += data

    def _end_header(self) -> None:
        name, value = self._header
        self._header = [b"", b""]
        if name.lower() == b"content-disposition":
            self._name = parse_options_header(value)[1].get(b"name")

    def _end(self) -> None:
        if self._name is None:
            raise not_a_form()
        self.fields.append((self._name, b"".join(self._data)))

    def _complete(self) -> None:
        self.is_complete = True
