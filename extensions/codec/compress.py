"""Compression of many images into an archive, chunk by chunk, resumable."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from ade_base.files import only_writer
from ade_base.messages import counted
from extensions.codec.archive import (
    FORMAT_VERSION,
    header_bytes,
    read_chunk,
    scan,
    write_chunk,
    write_end,
    write_header,
)
from extensions.codec.chunks import MAX_BYTES, MAX_IMAGES, ChunkCoder, Figures, kinds_if_of
from extensions.codec.errors import CodingError, Damaged, TooLarge
from extensions.codec.image_coder import ImageCoder
from extensions.codec.networks import Networks, codec_digest, fingerprint
from extensions.codec.pictures import Picture
from extensions.codec.sources import Source
from serving.engine.bundle import Bundle
from serving.engine.engine import InferenceEngine, NotFinite
from serving.verdict.calibration_file import CalibrationPair


@dataclass
class Report:
    """What an archive costs.

    Attributes:
        figures: of the images that this call compressed.
        resumed: number of images that an earlier call had compressed.
        archive_bytes: size of the archive.
        without_metadata: files whose metadata is not in the archive.
        bound_seconds: processor time that the bound of ``ade score`` took.
        not_reproduced: chunks that the model did not reproduce, and which are stored without it.
    """

    figures: Figures = field(default_factory=Figures)
    resumed: int = 0
    archive_bytes: int = 0
    without_metadata: int = 0
    bound_seconds: float = 0.0
    not_reproduced: int = 0

    def lines(self) -> list[str]:
        """The report as text."""
        f = self.figures
        lines = [
            f"{counted(f.images, 'image')}: {f.coded} coded by the model, {f.initial} stored to "
            f"start the coder (initial bits), {f.images - f.coded - f.initial} stored because the "
            "model cannot code them or would need more bytes"
        ]
        if f.coded:
            net = f.coded_bits / f.values
            line = f"net rate of the model's images: {net:.4f} bits per dimension"
            if f.bound_bits:
                bound = f.bound_bits / f.values
                line += f"; bound of ade score: {bound:.4f} ({100 * (net / bound - 1):+.2f} %)"
            lines.append(line)
            all_bits = 8 * (f.initial_bytes + f.table_bytes) + f.coded_bits
            if not f.initial_files:  # their number of pixels is not known
                lines.append(
                    f"with initial bits ({f.initial_bytes} bytes) and names ({f.table_bytes} "
                    f"bytes): {all_bits / (f.values + f.initial_values):.4f} bits per dimension"
                )
        if f.stored_bytes:
            lines.append(f"stored without the model: {f.stored_bytes} bytes")
        if self.resumed:
            lines.append(f"resumed: {counted(self.resumed, 'image')} compressed before")
        if self.not_reproduced:
            lines.append(
                f"warning: {counted(self.not_reproduced, 'chunk')} stored without the model, which "
                "did not reproduce the images"
            )
        if self.without_metadata:
            lines.append(
                f"the metadata of {counted(self.without_metadata, 'file')} is not in the archive"
            )
        lines.append(f"archive: {self.archive_bytes} bytes")
        return lines


def compress(
    source: Source,
    out: Path,
    bundle: Bundle,
    verify: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Compress images into a new archive.

    Chunks are appended to ``OUT.part``. After an interruption the same call resumes after the last
    complete chunk. ``OUT`` appears when everything is written.

    Args:
        source: the images.
        out: the archive; must not exist.
        bundle: with a codec.
        verify: decode each chunk and compare it with the images before it is written.
        progress: called with the number of images done and of all.

    Raises:
        CodingError: ``out`` exists, an image cannot be read, the machine is too busy to verify one,
            another process writes the archive, or ``OUT.part`` belongs to other images or another
            model, or is another file.
        BundleError: the bundle's files do not match its manifest.
    """
    if os.path.lexists(out):
        raise CodingError(f"{out} exists: take another name")
    networks = Networks(bundle)
    coder = ChunkCoder(ImageCoder(networks), networks.image_shape)
    header = {
        "format_version": FORMAT_VERSION,
        "kind": source.kind,
        "images": source.count,
        "image_shape": list(networks.image_shape),
        "bundle": {"model": bundle.model_id, "codec": codec_digest(bundle)},
        "fingerprint": fingerprint(),
        "input": source.identity,
        "verified": verify,
    }
    # The calibration may be invalid, and the bound does not need it.
    engine = InferenceEngine(bundle.uncalibrated(), device="cpu", operations=["score"])
    report = Report()
    part = out.with_name(out.name + ".part")
    with only_writer(out, CodingError), _open_part(part) as file:
        if os.path.lexists(out):  # another process has finished meanwhile
            if not os.fstat(file.fileno()).st_size:  # opening made it
                part.unlink()
            raise CodingError(f"{out} exists: take another name")
        done = report.resumed = _resume(file, part, header, source, report)
        progress(done, source.count)
        while done < source.count:
            pictures = _read(source, done)
            names = _names(source, done, len(pictures))
            payload, figures, kinds = coder.encode(names, pictures)
            if verify and not _reproduced(coder, payload, names, len(pictures)):
                report.not_reproduced += 1
                payload, figures, kinds = coder.encode(names, pictures, use_model=False)
                if not _reproduced(coder, payload, names, len(pictures)):
                    # Such as a large one, whose WebP takes longer to decode than is allowed.
                    pictures = [Picture(None, p.data) if p.data else p for p in pictures]
                    payload, figures, kinds = coder.encode(names, pictures, use_model=False)
                    if not _reproduced(coder, payload, names, len(pictures)):
                        raise CodingError("an image cannot be stored: this is a bug")
            started = time.process_time()
            by_kind = list(zip(kinds, pictures, strict=True))
            report.without_metadata += _without_metadata(kinds, pictures)
            figures.bound_bits = _bound_bits(engine, [p for kind, p in by_kind if kind == "m"])
            report.bound_seconds += time.process_time() - started
            write_chunk(file, done, len(pictures), payload)
            done += len(pictures)
            report.figures.add(figures)
            progress(done, source.count)
        write_end(file, done)
        report.archive_bytes = file.tell()
        if os.path.lexists(out):
            raise CodingError(f"{out} was made by another process meanwhile: it stays as it is")
        os.rename(part, out)
    return report


def _read(source: Source, first: int) -> list[Picture]:
    """The images of the next chunk."""
    pictures: list[Picture] = []
    size = 0
    while first + len(pictures) < source.count and len(pictures) < MAX_IMAGES and size < MAX_BYTES:
        pictures.append(source.read(first + len(pictures)))
        size += pictures[-1].num_bytes
    return pictures


def _names(source: Source, first: int, count: int) -> list[str] | None:
    if source.kind == "array":
        return None
    return [str(source.name(i)) for i in range(first, first + count)]


def _reproduced(coder: ChunkCoder, payload: bytes, names: Sequence[str] | None, count: int) -> bool:
    """Whether a chunk decodes to the images that were encoded, of which it has the digest."""
    try:
        for _ in coder.decode(payload, count):
            pass
    except Damaged:
        return False
    except TooLarge:
        if names is None:  # images of an array are no files, as which they could be stored
            raise
        return False
    return True


def _bound_bits(engine: InferenceEngine, pictures: list[Picture]) -> float:
    """The size of images by the bound of ``ade score``, bits."""
    pixels = [p.pixels for p in pictures if p.pixels is not None]
    no_verdict = [CalibrationPair()] * len(pixels)  # not by a named calibration either
    scores = engine.score(np.stack(pixels), calibrations=no_verdict) if pixels else []
    return sum(score.bpd * pixels[0].size for score in scores if not isinstance(score, NotFinite))


def _open_part(part: Path) -> IO[bytes]:
    """Open for reading and writing, without following links at this predictable path."""
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    return open(descriptor, "r+b")


def _without_metadata(kinds: str, pictures: list[Picture]) -> int:
    return sum(p.has_metadata for kind, p in zip(kinds, pictures, strict=True) if kind != "f")


def _resume(
    file: IO[bytes], part: Path, header: dict[str, Any], source: Source, report: Report
) -> int:
    """The number of images in an unfinished archive, after its incomplete end is cut off.

    Enters into the report what these images lose.
    """
    try:
        contents = scan(file, part)
    except CodingError as error:
        start = header_bytes(header)
        file.seek(0)
        if not start.startswith(file.read(len(start))):
            raise CodingError(f"{error}: remove it, or take another name") from None
        file.seek(0)  # a new file, or an earlier call was killed while it wrote the header
        file.truncate()
        write_header(file, header)
        return 0
    if contents.header != header:
        different = [name for name in header if contents.header.get(name) != header[name]]
        raise CodingError(
            f"{part} was started with other values of {', '.join(different)}: remove it to start "
            "again"
        )
    done, end = 0, None
    for chunk in contents.chunks:
        payload = read_chunk(file, chunk)
        if payload is None or chunk.first != done:
            break
        pictures = [source.read(i) for i in range(done, done + chunk.count)]
        kinds = kinds_if_of(payload, _names(source, done, chunk.count), pictures)
        if kinds is None:
            raise CodingError(
                f"the images have changed since {part} was started: remove it to start again"
            )
        report.without_metadata += _without_metadata(kinds, pictures)
        done, end = done + chunk.count, chunk.offset + chunk.length
    if end is None:
        file.seek(0)
        file.truncate()
        write_header(file, header)
        return 0
    file.truncate(end)
    return done
