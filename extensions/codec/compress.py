"""Compression of many images into an archive, chunk by chunk, resumable."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ade_base.files import only_writer
from ade_base.messages import counted
from extensions.codec.archive import FORMAT_VERSION, Part
from extensions.codec.chunks import MAX_BYTES, MAX_IMAGES, Chunk, ChunkCoder, Figures, digest_as
from extensions.codec.errors import CodingError, Damaged
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
        dims: values of an image that the model codes.
        figures: of the images that this call compressed.
        resumed: number of images that an earlier call had compressed.
        archive_bytes: size of the archive.
        checking_seconds: processor time of decoding again, and of the bound of ``ade score``.
        not_reproduced: chunks that the model did not reproduce, and which are stored without it.
    """

    dims: int
    figures: Figures = field(default_factory=Figures)
    resumed: int = 0
    archive_bytes: int = 0
    checking_seconds: float = 0.0
    not_reproduced: int = 0

    def lines(self) -> list[str]:
        """The report as text."""
        f = self.figures
        stored = f.images - f.coded - f.initial
        lines = [
            f"{counted(f.images, 'image')}: {f.coded} coded by the model, {f.initial} stored to "
            f"start the coder (initial bits), {stored} stored because the model cannot code them "
            "or would need more bytes"
        ]
        if f.coded:
            net, bound = (bits / (self.dims * f.coded) for bits in (f.coded_bits, f.bound_bits))
            line = f"net rate of the model's images: {net:.4f} bits per dimension"
            if bound:
                line += f"; bound of ade score: {bound:.4f} ({100 * (net / bound - 1):+.2f} %)"
            lines.append(line)
        if f.coded and not self.resumed:
            lines.append(
                f"with initial bits, names and lengths: {self.whole_rate:.4f} bits per dimension"
            )
        if stored:
            lines.append(f"stored without the model: {f.stored_bytes} bytes")
        if self.resumed:
            lines.append(f"resumed: {counted(self.resumed, 'image')} compressed before")
        if self.not_reproduced:
            lines.append(
                f"warning: {counted(self.not_reproduced, 'chunk')} stored without the model, which "
                "did not reproduce the images"
            )
        lines.append(f"archive: {self.archive_bytes} bytes")
        return lines

    @property
    def whole_rate(self) -> float:
        """Bits per dimension of coded images and those that pay their initial bits."""
        f = self.figures
        return 8 * (self.archive_bytes - f.stored_bytes) / (self.dims * (f.coded + f.initial))


def compress(
    source: Source,
    out: Path,
    bundle: Bundle,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Compress images into a new archive.

    Each chunk is decoded and compared with its images before it is written, into the folder
    ``OUT.part``. After an interruption the same call resumes after the last of them. ``OUT``
    appears when everything is written.

    Args:
        source: the images.
        out: the archive; must not exist.
        bundle: with a codec.
        progress: called with the number of images done and of all.

    Raises:
        CodingError: ``out`` exists, an image cannot be read, another process writes the archive, or
            ``OUT.part`` belongs to other images or another model, or is another folder.
        BundleError: the bundle's files do not match its manifest.
    """
    _check_free(out)
    networks = Networks(bundle)
    coder = ChunkCoder(ImageCoder(networks), networks.image_shape)
    listed = json.dumps(source.names).encode()
    fields = {
        "format_version": FORMAT_VERSION,
        "bundle": {"model": bundle.model_id, "codec": codec_digest(bundle)},
        "fingerprint": fingerprint(),
        "shape": source.shape,
        "input": hashlib.sha256(listed).hexdigest(),  # of the names; contents are compared later
    }
    # The calibration may be invalid, and the bound does not need it.
    engine = InferenceEngine(bundle.uncalibrated(), device="cpu", operations=["score"])
    report = Report(int(np.prod(networks.image_shape)))
    counts: list[int] = []
    done = 0
    with only_writer(out, CodingError):
        _check_free(out)  # another process may have finished meanwhile
        part = Part(out.with_name(out.name + ".part"), fields)
        progress(0, source.count)
        while done < source.count:
            chunk = part.chunk(len(counts))
            if chunk is None:
                pictures = _read(source, done)
                chunk = _encode(coder, engine, source, done, pictures, report)
                part.add(len(counts), chunk)
            else:
                report.resumed += _check_same(chunk, source, done)
            counts.append(len(chunk.kinds))
            done += counts[-1]
            progress(done, source.count)
        part.finish(counts, out)
    report.archive_bytes = out.stat().st_size
    return report


def _check_free(out: Path) -> None:
    if os.path.lexists(out):
        raise CodingError(f"{out} exists: take another name")


def _read(source: Source, first: int) -> list[Picture]:
    """The images of the next chunk."""
    pictures: list[Picture] = []
    size = 0
    while first + len(pictures) < source.count and len(pictures) < MAX_IMAGES and size < MAX_BYTES:
        pictures.append(source.read(first + len(pictures)))
        size += pictures[-1].num_bytes
    return pictures


def _check_same(chunk: Chunk, source: Source, first: int) -> int:
    """Check that an earlier call coded these images; returns how many."""
    count = len(chunk.kinds)
    pictures = [source.read(i) for i in range(first, first + count)]
    if digest_as(pictures, chunk.kinds) != chunk.sha256:
        raise CodingError(
            "the images have changed since their compression was started: remove OUT.part to start "
            "again"
        )
    return count


def _encode(
    coder: ChunkCoder,
    engine: InferenceEngine,
    source: Source,
    first: int,
    pictures: list[Picture],
    report: Report,
) -> Chunk:
    """A chunk that decodes to its images; what it costs is entered into the report."""
    names = None if source.names is None else source.names[first : first + len(pictures)]
    chunk, figures = coder.encode(names, pictures)
    started = time.process_time()
    try:
        coder.decode(chunk, source.shape)
    except Damaged:
        report.not_reproduced += 1
        chunk, figures = coder.encode(names, pictures, use_model=False)
        try:
            coder.decode(chunk, source.shape)
        except Damaged as error:
            raise CodingError(f"an image cannot be stored: {error}") from error
    coded = [p.pixels for p, kind in zip(pictures, chunk.kinds, strict=True) if kind == "m"]
    figures.bound_bits = _bound_bits(engine, [pixels for pixels in coded if pixels is not None])
    report.checking_seconds += time.process_time() - started
    report.figures.add(figures)
    return chunk


def _bound_bits(engine: InferenceEngine, pixels: list[np.ndarray]) -> float:
    """The size of images by the bound of ``ade score``, bits."""
    no_verdict = [CalibrationPair()] * len(pixels)  # not by a named calibration either
    scores = engine.score(np.stack(pixels), calibrations=no_verdict) if pixels else []
    return sum(score.bpd * pixels[0].size for score in scores if not isinstance(score, NotFinite))
