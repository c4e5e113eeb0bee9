"""The file of a calibration: one for images of the model's size and one for resized images."""

from __future__ import annotations

import hashlib
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np

from ade_base.files import read_file
from ade_base.messages import show, visible
from ade_base.pictures.show import coder_version
from ade_base.pictures.view import Look
from ade_client.contract import DEFAULT
from serving.verdict.calibration import Calibration, CalibrationError
from serving.verdict.encoder import EncoderMemory

RESIZED_PREFIX = "resized_"  # of the arrays of a second calibration
VERSION_DIGITS = 12  # of the file's SHA-256
ZIP = b"PK\x03\x04"  # the beginning of an .npz file
ZIP_ENTRY = b"PK\x01\x02"  # the beginning of an entry of its directory
MAX_ENTRIES = 1000  # a file has some dozens
MAX_CALIBRATION_BYTES = 256 * 2**20  # of a file, and of its arrays
MAX_LABEL = 200  # characters of `webp`, which messages quote
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class UnknownCalibration(CalibrationError):
    """There is no calibration of this name."""


def check_name(name: str) -> None:
    """Check that a calibration can have this name, which is part of file names and metrics.

    Raises:
        CalibrationError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise CalibrationError(
            "the name of a calibration must have at most 64 letters, digits, '-', '_' and '.', and "
            f"begin with a letter or digit; got {show(name)}"
        )


@dataclass(frozen=True)
class CalibrationPair:
    """Calibrations for images of the model's size and for resized ones; ``None`` means no verdict.

    Attributes:
        exact: for images of the model's size.
        resized: for images that a request resized; may be the same object.
        name: the name that requests give.
        version: the first digits of its file's SHA-256; empty if it was not read from a file.
        webp: version of libwebp that computed the statistics; empty in files of versions before.
    """

    exact: Calibration | None = None
    resized: Calibration | None = None
    name: str = DEFAULT
    version: str = ""
    webp: str = ""

    def of(self, resized: bool) -> Calibration | None:
        """The one for an image that was or was not resized."""
        return self.resized if resized else self.exact

    def look_of(self, resized: bool) -> Look:
        """How an image is looked at, resized or not."""
        calibration = self.of(resized)
        return Look(0) if calibration is None else calibration.look

    @property
    def encoders(self) -> tuple[EncoderMemory | None, EncoderMemory | None]:
        """What the encoder knows of images of the model's size, and of resized ones."""
        exact, resized = (
            None if its is None else its.encoder for its in (self.exact, self.resized)
        )
        return exact, resized

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder sees the originals of images."""
        return any(its is not None for its in self.encoders)

    @property
    def label(self) -> dict[str, str] | None:
        """Its name and version in answers; ``None`` without any calibration."""
        return None if self.exact is None else {"name": self.name, "version": self.version}

    def check(self, statistics: Sequence[str]) -> None:
        """Check that verdicts can be computed with calibrations that were read from a file.

        Args:
            statistics: names of the statistics that are computed.

        Raises:
            CalibrationError: they cannot.
        """
        for calibration in filter(None, (self.exact, self.resized)):
            calibration.check_statistics(statistics)

    def other_coder(self) -> str | None:
        """A warning if the statistics were computed with another version of libwebp than here."""
        if self.webp in ("", coder_version()):
            return None
        return (
            f"{self.name} was calibrated with libwebp {self.webp}, but this is {coder_version()}: "
            "verdicts may be slightly off until you run ade calibrate again"
        )

    def to_bytes(self) -> bytes:
        """An ``.npz`` file. One calibration for both paths is stored once, with ``resize`` set.

        Raises:
            CalibrationError: there is no calibration for images of the model's size, or the arrays
                are larger than :meth:`load` takes.
        """
        if self.exact is None:
            raise CalibrationError(
                "a calibration of resized images goes with one of images of the model's size"
            )
        second = {} if self.resized is None or self.resized is self.exact else self.resized.arrays()
        out = io.BytesIO()
        arrays: dict[str, Any] = {
            **self.exact.arrays(),
            **{RESIZED_PREFIX + name: its for name, its in second.items()},
        }
        if self.webp:
            arrays["webp"] = np.array(self.webp)
        size = sum(np.asarray(its).nbytes for its in arrays.values())
        if size > MAX_CALIBRATION_BYTES - 2**20:  # with the arrays' headers
            raise CalibrationError(
                f"a calibration may take at most {MAX_CALIBRATION_BYTES:,} bytes, this one takes "
                f"{size:,}: give features with fewer values"
            )
        np.savez_compressed(out, **arrays)
        return out.getvalue()

    @classmethod
    def load(cls, path: Path, name: str = DEFAULT) -> CalibrationPair:
        """Read what :meth:`to_bytes` made, or the single calibration of an older file.

        Args:
            path: a regular file. It is read once, so that the version fits the content.
            name: the name that requests give.

        Raises:
            CalibrationError: the file is not a calibration, or its arrays do not fit together.
        """
        try:
            content = read_file(path, MAX_CALIBRATION_BYTES)
            if not content.startswith(ZIP):  # NumPy would take it for a pickle
                raise ValueError(f"expected an .npz file, got {len(content)} bytes of another kind")
            entries = content.count(ZIP_ENTRY)  # each takes memory as soon as the file is opened
            if entries > MAX_ENTRIES:
                raise ValueError(f"expected at most {MAX_ENTRIES} arrays, got {entries}")
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                _check_sizes(arrays.zip)
                # An array whose name is damaged would not be missed where it need not be there.
                damaged = arrays.zip.testzip()
                if damaged is not None:
                    raise ValueError(f"{show(damaged)} is damaged")
                exact = Calibration.from_arrays(arrays)
                if f"{RESIZED_PREFIX}scores" in arrays:
                    resized: Calibration | None = Calibration.from_arrays(arrays, RESIZED_PREFIX)
                else:
                    resized = exact if exact.resize == "fit" else None
                for calibration in filter(None, (exact, resized)):
                    calibration.check_values()
                return cls(
                    exact,
                    resized,
                    name,
                    version_of(content),
                    _label(arrays, "webp"),
                )
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RuntimeError,
            OSError,
            EOFError,
            BadZipFile,
            zlib.error,
        ) as error:
            raise CalibrationError(f"{path} is not a calibration: {visible(str(error))}") from error


def _check_sizes(archive: ZipFile) -> None:
    """Check that reading the arrays takes no more memory than those of any calibration.

    Raises:
        ValueError: they are larger, or packed so that nothing limits what one read returns.
    """
    entries = archive.infolist()
    if any(entry.compress_type not in (ZIP_STORED, ZIP_DEFLATED) for entry in entries):
        raise ValueError("its arrays must be stored or deflated")
    size = sum(entry.file_size for entry in entries)
    if size > MAX_CALIBRATION_BYTES:
        raise ValueError(
            f"its arrays must have at most {MAX_CALIBRATION_BYTES:,} bytes, got {size:,}"
        )


def _label(arrays: Mapping[str, np.ndarray], name: str) -> str:
    """One of the file's short texts, which messages show; empty if the file lacks it."""
    text = str(arrays[name]) if name in arrays else ""
    if len(text) > MAX_LABEL or not text.isprintable():
        raise ValueError(
            f"{name} must be at most {MAX_LABEL} printable characters, got {show(text)}"
        )
    return text


def version_of(content: bytes) -> str:
    """The version of a calibration from its file's content."""
    return hashlib.sha256(content).hexdigest()[:VERSION_DIGITS]
