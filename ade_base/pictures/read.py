"""Reads image files to RGB. Limits are checked before decoding."""

from __future__ import annotations

from pathlib import PurePosixPath

from ade_base.pictures.convert import DecodedImage, decode
from ade_base.pictures.decoders import decode_apart
from ade_base.pictures.limits import USUAL_PIXELS, ImageError
from ade_base.pictures.structure import read_structure

IMAGE_SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"]
    + [".avif", ".heic", ".heif", ".hif"]
)
MAX_PIXELS = USUAL_PIXELS
MAX_SCALED_PIXELS = 51_000_000  # of images that are decoded at a reduced size; 8192 x 6144
MAX_FILE_BYTES = 16 * 2**20
RESIZING = '"resize": "fit"'  # what a request says to have images resized


def is_image_name(name: str) -> bool:
    """Whether a file's name has the suffix of an image.

    macOS writes ``._cat.png``, which holds no pixels, beside ``cat.png`` into zips and on foreign
    disks.
    """
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("._")


def file_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the header; ``None`` if the file is not an accepted image."""
    try:
        structure = read_structure(data)
    except ImageError:
        return None
    return structure.width, structure.height


def header_pixels(data: bytes) -> int:
    """Pixel count from the header, or 0 if unreadable."""
    width, height = file_size(data) or (0, 0)
    return width * height


def in_options(message: str) -> str:
    """An error about an image in the words of the command line."""
    return message.replace(RESIZING, "--resize fit")


def read_image(data: bytes, size: tuple[int, int] | None = None) -> DecodedImage:
    """Decode an image file to RGB.

    Applies the EXIF orientation, composites alpha on white, keeps the high byte of 16-bit samples
    and takes the first frame of an animation; each of these adds a note.

    A large JPEG or HEIC is decoded at 1/2, 1/4 or 1/8 of its size, so that both sides keep at least
    1024 pixels. ``size`` of the result is that of the file.

    The structure of the file is checked first. Small files in simple formats are decoded in this
    process, all others in a process with limits of memory and time.

    Args:
        data: the whole file.
        size: required width and height. Other images are rejected before decoding, except that
            EXIF may swap width and height.

    Raises:
        ImageError: the format is unknown, or the image is damaged, too large, of another size, or
            greyscale of 12 or 32 bits, of signed or floating-point numbers, or of 16 bits with
            white at 0.
        MemoryError: there is not enough memory to decode it.
    """
    if not data:
        raise ImageError("not_an_image", "the image is empty: 0 bytes came")
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(
            "too_large",
            f"an image file may have at most {MAX_FILE_BYTES} bytes, this one has {len(data)}",
        )
    structure = read_structure(data)
    width, height = structure.width, structure.height
    limit = MAX_SCALED_PIXELS if structure.scale > 1 else MAX_PIXELS
    if width * height > limit:
        raise ImageError(
            "too_large",
            f"an image may have at most {limit} pixels, this one has {width} x {height}",
        )
    if size is not None and (width, height) not in (size, size[::-1]):
        raise ImageError(
            "wrong_size",
            f"images must be {size[0]} x {size[1]} pixels, got {width} x {height}; "
            f"{RESIZING} resizes them",
        )
    return (decode if structure.is_plain else decode_apart)(data, structure)
