"""A chunk of an archive: some hundred images that can be decoded without the others.

The model's images share one stack of bits. Coding an image first pops bits, so the stack must not
be empty at the start: it starts with images that are stored without the model, whose bytes serve as
these *initial bits*. They come back when all other images have been popped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from extensions.codec.errors import Damaged, NotCoded
from extensions.codec.image_coder import ImageCoder
from extensions.codec.pictures import Picture, Restored, digest_of, from_webp
from extensions.codec.stack import Stack

MAX_IMAGES = 512
MAX_BYTES = 32 * 2**20  # in memory; one image may exceed it
_MARGIN = 64  # words below which the stack must not fall
_FIRST_NEED = 2**16  # words on the stack for the first image, whose need is unknown
_NO_WORDS = np.zeros(0, np.uint32)


@dataclass(frozen=True)
class Chunk:
    """Images, coded.

    Attributes:
        names: of the files; ``None`` for images of an array.
        kinds: how each image is stored: ``m`` by the model, ``i`` as initial bits, ``s`` otherwise.
        sizes: bytes of each image that the model does not code.
        sha256: of what must come back.
        data: the stack of the model's images, little-endian uint32, then the images ``s``.
    """

    names: list[str] | None
    kinds: str
    sizes: list[int]
    sha256: str
    data: bytes

    @classmethod
    def checked(cls, table: Any, data: bytes, count: int) -> Chunk:
        """A chunk of an archive, from anywhere.

        Raises:
            Damaged: no encoder writes it.
        """
        if not isinstance(table, dict) or set(table) != {"names", "kinds", "sizes", "sha256"}:
            raise Damaged("the table of a chunk is not complete")
        names, kinds, sizes = table["names"], table["kinds"], table["sizes"]
        is_valid = (
            isinstance(kinds, str)
            and len(kinds) == count
            and set(kinds) <= {"m", "i", "s"}
            and _are(sizes, int)
            and len(sizes) == count - kinds.count("m")
            and min(sizes, default=0) >= 0
            and (names is None or (_are(names, str) and len(names) == count))
        )
        if not is_valid:
            raise Damaged("the table of a chunk is not valid")
        return cls(**table, data=data)


@dataclass
class Figures:
    """What images cost.

    Attributes:
        images: number of images.
        coded: those that the model coded.
        initial: those that pay the initial bits of others.
        coded_bits: net size of the coded images, initial bits not counted.
        bound_bits: their size by the bound of ``ade score``.
        stored_bytes: size of the images that are neither.
    """

    images: int = 0
    coded: int = 0
    initial: int = 0
    coded_bits: int = 0
    bound_bits: float = 0.0
    stored_bytes: int = 0

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
        self, names: list[str] | None, pictures: Sequence[Picture], use_model: bool = True
    ) -> tuple[Chunk, Figures]:
        """Encode images.

        Args:
            names: of the files; ``None`` for an array.
            pictures: one or more.
            use_model: whether the model may be used.

        Returns:
            The chunk and what it costs.
        """
        without = _pack(names, pictures, ["s"] * len(pictures), _NO_WORDS, 0)
        fits = [
            i
            for i, picture in enumerate(pictures)
            if picture.pixels is not None and picture.pixels.shape == self.image_shape
        ]
        if not use_model or not fits:
            return without
        if not self.need:
            self._measure(pictures[fits[0]])
        wanted = 4 * (self.need + self.need // 4 + _MARGIN)
        paid = b""
        kinds = ["s"] * len(pictures)
        while fits and len(paid) < wanted:
            kinds[fits[0]] = "i"
            paid += pictures[fits.pop(0)].stored
        stack = Stack(_words(paid), sealed=True)
        empty = stack.bits
        for i in fits:
            pixels = pictures[i].pixels
            assert pixels is not None
            trial = stack.copy()
            trial.low, before = 2**62, trial.bits
            try:
                self.coder.encode(pixels, trial)
            except NotCoded:
                continue
            self.need = max(self.need, before // 32 - trial.low)
            if trial.low >= _MARGIN and trial.bits - before < 8 * len(pictures[i].stored):
                stack = trial
                kinds[i] = "m"
        with_model = _pack(names, pictures, kinds, stack.finish(), stack.bits - empty)
        if "m" not in kinds or len(with_model[0].data) >= len(without[0].data):
            return without
        return with_model

    def decode(self, chunk: Chunk, array_shape: Sequence[int] | None) -> list[Restored]:
        """Decode the images of a chunk.

        Args:
            chunk: what :meth:`encode` returned, or any other.
            array_shape: ``(N, H, W, C)``; ``None`` for files.

        Raises:
            Damaged: the images are not those that were encoded, or no encoder writes this chunk.
        """
        try:
            images = self._decode(chunk, None if array_shape is None else tuple(array_shape[1:]))
        except NotCoded as error:
            raise Damaged(str(error)) from error
        if digest_of(images) != chunk.sha256:
            raise Damaged("the decoded images are not those that were encoded")
        return images

    def _decode(self, chunk: Chunk, shape: tuple[int, ...] | None) -> list[Restored]:
        if (chunk.names is None) != (shape is not None):
            raise Damaged("images of an array have no names, and files have one each")
        coded = chunk.kinds.count("m")
        if coded and shape not in (None, self.image_shape):
            raise Damaged("the model codes images of another shape than the array's")
        # An encoder would have begun another chunk.
        most = (
            coded * math.prod(self.image_shape)
            if shape is None
            else ((len(chunk.kinds) - 1) * math.prod(shape))
        )
        if most > 2 * MAX_BYTES:
            raise Damaged("a chunk has too many pixels")
        sizes = iter(chunk.sizes)
        lengths = [0 if kind == "m" else next(sizes) for kind in chunk.kinds]
        paid = [n for n, kind in zip(lengths, chunk.kinds, strict=True) if kind == "i"]
        end = len(chunk.data) - (sum(lengths) - sum(paid))
        if end < 0 or end % 4:
            raise Damaged("a chunk is incomplete")
        decoded: list[np.ndarray] = []
        initial = b""
        if coded:
            stack = Stack(np.frombuffer(chunk.data[:end], "<u4"), sealed=False)
            decoded = [self.coder.decode(stack) for _ in range(coded)]
            initial = stack.unseal().astype("<u4").tobytes()
        if sum(paid) > len(initial):
            raise Damaged("a stored image is incomplete")
        sources = {"i": memoryview(initial), "s": memoryview(chunk.data)[end:]}
        images: list[Restored] = []
        for kind, length in zip(chunk.kinds, lengths, strict=True):
            if kind == "m":
                images.append(decoded.pop())
                continue
            stored, sources[kind] = bytes(sources[kind][:length]), sources[kind][length:]
            images.append(stored if shape is None else from_webp(stored, shape))
        return images

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


def digest_as(pictures: Sequence[Picture], kinds: str) -> str:
    """The digest of a chunk that stores these images in these ways."""
    return digest_of(p.restored(kind == "m") for p, kind in zip(pictures, kinds, strict=True))


def _pack(
    names: list[str] | None,
    pictures: Sequence[Picture],
    kinds: list[str],
    words: np.ndarray,
    coded_bits: int,
) -> tuple[Chunk, Figures]:
    stored = [p.stored for p, kind in zip(pictures, kinds, strict=True) if kind == "s"]
    data = words.astype("<u4").tobytes() + b"".join(stored)
    sizes = [len(p.stored) for p, kind in zip(pictures, kinds, strict=True) if kind != "m"]
    joined = "".join(kinds)
    chunk = Chunk(names, joined, sizes, digest_as(pictures, joined), data)
    figures = Figures(
        images=len(pictures),
        coded=kinds.count("m"),
        initial=kinds.count("i"),
        coded_bits=coded_bits,
        stored_bytes=sum(map(len, stored)),
    )
    return chunk, figures


def _words(data: bytes) -> np.ndarray:
    return np.frombuffer(data + bytes(-len(data) % 4), "<u4").astype(np.uint32)


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
