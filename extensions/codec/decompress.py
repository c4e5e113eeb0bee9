"""Decompression of an archive, as far as it is intact."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ade_base.files import new_folder, only_writer, preallocated, replacing
from ade_base.messages import show
from extensions.codec.archive import Archive
from extensions.codec.chunks import ChunkCoder
from extensions.codec.errors import CodingError, Damaged
from extensions.codec.image_coder import ImageCoder
from extensions.codec.names import is_safe
from extensions.codec.networks import Networks, codec_digest, fingerprint
from extensions.codec.pictures import Restored, to_png
from serving.engine.bundle import Bundle

# Writes images: the number of the first, names of files, and the images.
Write = Callable[[int, list[str], list[Restored]], None]


@dataclass
class Result:
    """What came back.

    Attributes:
        images: number of images of the archive.
        lost: those that did not come back, by their places in the archive.
    """

    images: int
    lost: list[range] = field(default_factory=list)

    @property
    def restored(self) -> int:
        """Number of images that came back."""
        return self.images - sum(len(lost) for lost in self.lost)


def decompress(
    archive: Path,
    out: Path,
    bundle: Bundle,
    warn: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Restore the images of an archive.

    Args:
        archive: of :func:`extensions.codec.compress.compress`.
        out: a new folder, or a new ``.npy`` file for an archive of an array.
        bundle: the one that the archive was made with.
        warn: called before the start if this processor or its software is not that of the encoder,
            and for each chunk that does not come back.
        progress: called with the number of images done and of all.

    Returns:
        What came back. A chunk that is damaged loses its own images: their files are missing, and
        the rows of an array are zero.

    Raises:
        CodingError: the file is not an archive, nothing in it can be decoded, it was made with
            another bundle, has names that leave its folder or repeat, or ``out`` exists or is of
            the wrong kind.
        BundleError: the bundle's files do not match its manifest.
    """
    with Archive(archive) as contents:
        _check_target(contents, out)
        networks = Networks(bundle)
        if contents.made_with.get("codec") != codec_digest(bundle):
            raise CodingError(
                f"{archive} was made with the model {show(contents.made_with.get('model'))}, and "
                f"{bundle.folder} is {bundle.model_id} or has another codec: only the bundle that "
                "compressed the images can restore them"
            )
        for line in _differences(contents.fingerprint):
            warn(line)
        coder = ChunkCoder(ImageCoder(networks), networks.image_shape)
        total, done, why = sum(contents.counts), 0, ""
        result = Result(total)
        target = _folder(out) if contents.shape is None else _array(out, contents.shape)
        with target as write:
            progress(0, total)
            for number, count in enumerate(contents.counts):
                try:
                    chunk = contents.chunk(number)
                    images = coder.decode(chunk, contents.shape)
                except Damaged as error:
                    why = why or str(error)
                    result.lost.append(range(done, done + count))
                    warn(f"the images {done + 1} to {done + count} are lost: {error}")
                else:
                    write(done, chunk.names or [], images)
                done += count
                progress(done, total)
            if not result.restored:
                raise CodingError(
                    f"{archive}: no image came back: {why}. The archive is damaged, or this "
                    "processor computes other numbers than the encoder's"
                )
    return result


@contextmanager
def _folder(out: Path) -> Iterator[Write]:
    with new_folder(out, CodingError) as folder:

        def write(first: int, names: list[str], images: list[Restored]) -> None:
            for name, image in zip(names, images, strict=True):
                if not is_safe(name):
                    raise CodingError(f"the archive has the name {show(name)}, which leaves {out}")
                path = folder / name
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with open(path, "xb") as file:  # never follows a link, never replaces a file
                        file.write(image if isinstance(image, bytes) else to_png(image))
                except (FileExistsError, NotADirectoryError) as error:
                    raise CodingError(
                        f"the archive has a second image for {show(name)}, perhaps in other "
                        f"letters, which are the same on the disk of {out}"
                    ) from error
                except (OSError, UnicodeEncodeError) as error:
                    reason = getattr(error, "strerror", None) or "it is not a name here"
                    raise CodingError(f"{out}: {show(name)} cannot be written: {reason}") from error

        yield write


@contextmanager
def _array(out: Path, shape: tuple[int, ...]) -> Iterator[Write]:
    with only_writer(out, CodingError), replacing(out) as file:
        rows = preallocated(file, shape, out.parent, CodingError)

        def write(first: int, names: list[str], images: list[Restored]) -> None:
            for index, pixels in enumerate(images, first):
                rows[index] = pixels

        yield write


def _check_target(contents: Archive, out: Path) -> None:
    if os.path.lexists(out):
        raise CodingError(f"{out} exists: take another name")
    if (out.suffix == ".npy") != (contents.shape is not None):
        raise CodingError(
            f"the archive holds files: give a new folder, not {out}"
            if contents.shape is None
            else "the archive holds an array: give a file that ends with .npy"
        )


def _differences(encoder: dict[str, Any]) -> list[str]:
    """A warning if the encoder's processor or software was another one."""
    here = fingerprint()
    different = [name for name in here if encoder.get(name) != here[name]]
    if not different:
        return []
    listed = "; ".join(
        f"{name}: {show(encoder.get(name))}, here {show(here[name])}" for name in different
    )
    return [
        f"the archive was made with another processor or other software ({listed}). The model's "
        "numbers may differ in their last digits; then images coded by the model cannot come back "
        "here, and their checksums say so"
    ]
