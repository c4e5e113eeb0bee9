"""A chunk of an archive: some hundred images that can be decoded without the others.

The model's images share one stack of bits. Coding an image first pops bits, so the stack must not
be empty at the start: it starts with images that are stored without the model, whose bytes serve as
these *initial bits*. They come back when all other images have been popped.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from extensions.codec.errors import Damaged, NotCoded
from extensions.codec.image_coder import ImageCoder
from extensions.codec.pictures import Picture, inflate, read_stored, update_digest
from extensions.codec.stack import Stack

MAX_IMAGES = 512
MAX_PARTS = 64  # of an image's name: folders and file; what makes or removes folders recurses
MAX_BYTES = 32 * 2**20  # in memory; one image may exceed it
MAX_PAYLOAD = 3 * MAX_BYTES
_MAX_TABLE = 16 * 2**20
_LENGTHS = struct.Struct("<II")  # bytes of the table, words of the stack
_MARGIN = 64  # words below which the stack must not fall
_FIRST_NEED = 2**16  # words on the stack for the first image, whose need is unknown


@dataclass
class Figures:
    """What the images of a chunk, or of several, cost.

    Attributes:
        images: number of images.
        coded: those that the model coded.
        initial: those that pay the initial bits of others.
        values: pixel values of the coded images.
        coded_bits: their net size, initial bits not counted.
        bound_bits: their size by the bound of ``ade score``; 0 if not computed.
        initial_bytes: size of the images that pay initial bits.
        initial_values: their pixel values, 0 for files that are stored byte for byte.
        initial_files: how many of them are such files.
        stored_bytes: size of all other images that the model did not code.
        table_bytes: size of names and lengths.
    """

    images: int = 0
    coded: int = 0
    initial: int = 0
    values: int = 0
    coded_bits: int = 0
    bound_bits: float = 0.0
    initial_bytes: int = 0
    initial_values: int = 0
    initial_files: int = 0
    stored_bytes: int = 0
    table_bytes: int = 0

    def add(self, other: Figures) -> None:
        """Add the figures of further images."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class ChunkCoder:
    """Encodes and decodes chunks.

    Attributes:
        coder: of single images.
        image_shape: ``(H, W, C)`` that the model codes.
        need: words that an image took from the stack, at most; found out while encoding.
    """

    coder: ImageCoder
    image_shape: tuple[int, int, int]
    need: int = 0

    def encode(
        self, names: Sequence[str] | None, pictures: Sequence[Picture], use_model: bool = True
    ) -> tuple[bytes, Figures, str]:
        """Encode images.

        Args:
            names: of the files; ``None`` for an array.
            pictures: one or more.
            use_model: whether the model may be used.

        Returns:
            The chunk, what it costs, and how each image is stored: ``m`` by the model, ``w`` as
            WebP, ``f`` as the file that it is.
        """
        stored = [picture.stored() for picture in pictures]
        fits = [
            picture.pixels is not None and picture.pixels.shape == self.image_shape
            for picture in pictures
        ]
        without = self._pack(names, pictures, stored, np.zeros(0, np.uint32), [], 0, 0)
        if not use_model or sum(fits) < 2:
            return without
        if not self.need:
            self._measure(next(p for p, fit in zip(pictures, fits, strict=True) if fit))
        wanted = 4 * (self.need + self.need // 4 + _MARGIN)
        paid, size = 0, 0
        while size < wanted and paid < len(pictures):
            size += len(stored[paid][1])
            paid += 1
        if paid == len(pictures):
            return without
        stack = Stack(_words(b"".join(blob for _, blob in stored[:paid])), sealed=True)
        coded: list[int] = []
        empty = stack.bits
        for i in range(paid, len(pictures)):
            if not fits[i]:
                continue
            pixels = pictures[i].pixels
            assert pixels is not None
            trial = stack.copy()
            trial.low, before = 2**62, trial.bits
            try:
                self.coder.encode(pixels, trial)
            except NotCoded:
                continue
            self.need = max(self.need, before // 32 - trial.low)
            if trial.low >= _MARGIN and trial.bits - before < 8 * len(stored[i][1]):
                stack = trial
                coded.append(i)
        with_model = self._pack(
            names, pictures, stored, stack.finish(), coded, paid, stack.bits - empty
        )
        if not coded or len(with_model[0]) >= len(without[0]):
            return without
        return with_model

    def decode(self, payload: bytes, count: int) -> Iterator[tuple[str | None, Picture]]:
        """Decode the images of a chunk, in order, one at a time.

        Args:
            payload: what :meth:`encode` returned, or anything else.
            count: number of images.

        Yields:
            Name, or ``None`` for images of an array, and image.

        Raises:
            Damaged: the chunk is not what an encoder writes, or the decoded images are not those
                that were encoded; then all of them were yielded and are invalid.
        """
        try:
            yield from self._decode(payload, count)
        except NotCoded as error:
            raise Damaged(str(error)) from error

    def _decode(self, payload: bytes, count: int) -> Iterator[tuple[str | None, Picture]]:
        table, words, rest, expected = _unpack(payload, count)
        kinds = table["kinds"]
        coded = kinds.count("m")
        if coded * int(np.prod(self.image_shape)) > 2 * MAX_BYTES:
            raise Damaged("a chunk has too many images")
        decoded: list[np.ndarray] = []
        initial = b""
        if coded:
            stack = Stack(words, sealed=False)
            decoded = [self.coder.decode(stack) for _ in range(coded)]
            initial = stack.unseal().astype("<u4").tobytes()
        blobs = _split(initial, rest, table["sizes"], table["paid"])
        grey = set(table["grey"])
        digest = hashlib.sha256()
        size = 0
        for i, kind in enumerate(kinds):
            if size >= MAX_BYTES:  # an encoder would have begun another chunk
                raise Damaged("a chunk has too many pixels")
            picture = (
                Picture(decoded.pop()) if kind == "m" else read_stored(kind, next(blobs), i in grey)
            )
            size += picture.num_bytes
            update_digest(digest, picture, kind == "f")
            yield (None if table["names"] is None else table["names"][i]), picture
        if digest.digest() != expected:
            raise Damaged("the decoded images are not those that were encoded")

    def _measure(self, picture: Picture) -> None:
        """Find out how many words one image takes from the stack."""
        words = np.random.Philox(key=0).random_raw(_FIRST_NEED // 2).view(np.uint32)
        stack = Stack(words, sealed=True)
        assert picture.pixels is not None
        try:
            self.coder.encode(picture.pixels, stack)
        except NotCoded:
            return
        self.need = len(words) - stack.low

    def _pack(
        self,
        names: Sequence[str] | None,
        pictures: Sequence[Picture],
        stored: Sequence[tuple[str, bytes]],
        words: np.ndarray,
        coded: list[int],
        paid: int,
        coded_bits: int,
    ) -> tuple[bytes, Figures, str]:
        by_model = set(coded)
        kinds = "".join("m" if i in by_model else kind for i, (kind, _) in enumerate(stored))
        blobs = [blob for i, (_, blob) in enumerate(stored) if i not in by_model]
        digest = hashlib.sha256()
        for kind, picture in zip(kinds, pictures, strict=True):
            update_digest(digest, picture, kind == "f")
        table = {
            "names": None if names is None else list(names),
            "kinds": kinds,
            "sizes": [len(blob) for blob in blobs],
            "paid": paid,
            "grey": [
                i
                for i, picture in enumerate(pictures)
                if kinds[i] == "w" and picture.pixels is not None and picture.pixels.shape[2] == 1
            ],
        }
        packed = zlib.compress(json.dumps(table, separators=(",", ":")).encode(), 9)
        rest = b"".join(blobs[paid:])
        payload = b"".join(
            [
                digest.digest(),
                _LENGTHS.pack(len(packed), len(words)),
                packed,
                words.astype("<u4").tobytes(),
                rest,
            ]
        )
        payers = [picture.pixels for picture in pictures[:paid]]
        figures = Figures(
            images=len(pictures),
            coded=len(coded),
            initial=paid,
            values=int(np.prod(self.image_shape)) * len(coded),
            coded_bits=coded_bits,
            initial_bytes=sum(len(blob) for blob in blobs[:paid]),
            initial_values=sum(known.size for known in payers if known is not None),
            initial_files=sum(known is None for known in payers),
            stored_bytes=len(rest),
            table_bytes=len(payload) - 4 * len(words) - len(rest),
        )
        return payload, figures, kinds


def kinds_if_of(
    payload: bytes, names: Sequence[str] | None, pictures: Sequence[Picture]
) -> str | None:
    """How a chunk stores each of these images, without decoding it; ``None`` if it has others.

    Raises:
        Damaged: the chunk is not what an encoder writes.
    """
    table, _, _, expected = _unpack(payload, len(pictures))
    digest = hashlib.sha256()
    for kind, picture in zip(table["kinds"], pictures, strict=True):
        update_digest(digest, picture, kind == "f")
    is_same = digest.digest() == expected and table["names"] == (
        None if names is None else list(names)
    )
    return "".join(table["kinds"]) if is_same else None


def _words(data: bytes) -> np.ndarray:
    return np.frombuffer(data + bytes(-len(data) % 4), "<u4").astype(np.uint32)


def _unpack(payload: bytes, count: int) -> tuple[dict[str, Any], np.ndarray, bytes, bytes]:
    """Table, words, further bytes and digest of a chunk."""
    start = 32 + _LENGTHS.size
    if len(payload) < start:
        raise Damaged("a chunk is too short")
    length, num_words = _LENGTHS.unpack_from(payload, 32)
    end = start + length + 4 * num_words
    if end > len(payload):
        raise Damaged("a chunk is too short")
    text = inflate(payload[start : start + length], _MAX_TABLE)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged("the table of a chunk is not JSON") from error
    if not _is_table(table, count):
        raise Damaged("the table of a chunk is not complete")
    words = np.frombuffer(payload, "<u4", num_words, start + length).astype(np.uint32)
    return table, words, payload[end:], payload[:32]


def _is_table(table: Any, count: int) -> bool:
    if not isinstance(table, dict):
        return False
    fields: list[Any] = [table.get(n) for n in ("names", "kinds", "sizes", "paid", "grey")]
    names, kinds, sizes, paid, grey = fields
    return (
        isinstance(kinds, str)
        and len(kinds) == count
        and set(kinds) <= {"m", "w", "f"}
        and _are(sizes, int)
        and len(sizes) == count - kinds.count("m")
        and min(sizes, default=0) >= 0
        and (names is None or (_are(names, str) and len(names) == count))
        and _are(grey, int)
        and type(paid) is int
        and 0 <= paid <= len(sizes)
    )


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _split(initial: bytes, rest: bytes, sizes: list[int], paid: int) -> Iterator[bytes]:
    """The stored images, of which the first ``paid`` are in the initial bits."""
    for data, lengths in ((initial, sizes[:paid]), (rest, sizes[paid:])):
        position = 0
        for length in lengths:
            if position + length > len(data):
                raise Damaged("a stored image is incomplete")
            yield data[position : position + length]
            position += length
