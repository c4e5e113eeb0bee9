"""Converts image files of every mode that Pillow reads to RGB, in the process that calls it."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ade_base.messages import words_of
from ade_base.pictures.limits import MIN_SCALED_SIDE, ImageError, Structure
from ade_base.pictures.structure_heif import without_exif
from ade_base.pictures.structure_tiff import check_exif

_BLOCK_PIXELS = 2**20  # converted at a time
# Of damaged metadata. `warnings.catch_warnings` would put back what it found, which with several
# threads may be what another one has set: then nothing of the process would be warned of any more.
_PILLOWS_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class DecodedImage:
    """A file's image, upright.

    Attributes:
        pixels: uint8 ``(H, W, 3)``; of a large image fewer than it has.
        notes: about conversions.
        size: width and height of the image in the file, turned like the pixels. Pixel ``(x, y)`` of
            the result lies at ``(x * size[0] / W, y * size[1] / H)`` there.
    """

    pixels: np.ndarray
    notes: list[str]
    size: tuple[int, int]


def decode(data: bytes, structure: Structure) -> DecodedImage:
    """Decode a file in this process.

    Args:
        data: the whole file.
        structure: of :func:`read_structure`.

    Raises:
        ImageError: the file is damaged.
        MemoryError: there is not enough memory to decode it.
    """
    notes: list[str] = []
    if _PILLOWS_WARNINGS not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOWS_WARNINGS[3].pattern)
    try:
        if structure.format == "HEIF":
            from pillow_heif import register_heif_opener  # an extra, which other files do not need

            register_heif_opener(
                decode_threads=1, thumbnails=False, depth_images=False, aux_images=False
            )
        if structure.format in ("AVIF", "HEIF"):
            data = without_exif(data)
        image: Image.Image = Image.open(io.BytesIO(data), formats=(structure.format,))
        if image.size != (structure.width, structure.height):
            raise ImageError(
                "not_an_image",
                f"the image is damaged: it has two sizes, {structure.width} x "
                f"{structure.height} and {image.width} x {image.height}",
            )
        stored = str(getattr(image, "tile", [])[:1])
        _scale_key(image, stored)
        if image.mode[0] in "IF":  # pillow-heif gives all greyscale above 8 bits as 16
            _check_bits(image.mode, stored if structure.format != "HEIF" else ";16")
        elif ";16" in stored or structure.bits > 8:
            notes.append(f"converted from {structure.bits or 16}-bit colour to 8 bits")
        check_tiff(image)
        if getattr(image, "is_animated", False):  # n_frames would be slow
            notes.append("first of several frames taken")
            image.seek(image.tell())  # of a HEIC, the one to show
        # Pillow turns a TIFF as it is loaded.
        is_turned = structure.format == "TIFF" and image.getexif().get(0x0112) in _TRANSPOSITIONS
        if structure.format == "JPEG":
            image.draft(None, (MIN_SCALED_SIDE, MIN_SCALED_SIDE))
        image.load()
        size = structure.width, structure.height
        # Pillow also finds EXIF in the text chunks of a PNG.
        if "exif" not in image.info and "Raw profile type exif" in image.info:
            check_exif(bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:])))
        orientation = image.getexif().get(0x0112)
        if orientation in _TRANSPOSITIONS:
            image = image.transpose(_TRANSPOSITIONS[orientation])
            size = size if orientation < 5 else size[::-1]
        if orientation in _TRANSPOSITIONS or is_turned:
            notes.append("EXIF orientation applied")
        return DecodedImage(
            _rgb(image, notes, 1 if structure.format == "JPEG" else structure.scale), notes, size
        )
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's parsers raise struct.error, SyntaxError, KeyError, …
        raise ImageError("not_an_image", f"the image is damaged: {words_of(error)}") from error


def _check_bits(mode: str, stored: str) -> None:
    """Reject greyscale values that are not 16-bit integers: their high bytes may all be black.

    Args:
        mode: of Pillow, for integers or floating-point numbers.
        stored: Pillow's description of the values in the file.
    """
    if mode == "F" or ";16" not in stored:
        bits = re.search(r"[FI];(\d+)", stored)
        raise ImageError(
            "not_an_image",
            "a greyscale image must have 8 or 16 bits per value, got "
            f"{bits[1] if bits else mode}{'-bit floating point' if mode == 'F' else ''}",
        )


def check_tiff(image: Image.Image) -> None:
    """Reject greyscale whose numbers Pillow takes for others.

    Args:
        image: that is opened, of any format.

    Raises:
        ImageError: a TIFF has signed values, or 16 bits and white at 0.
    """
    tags = getattr(image, "tag_v2", {})
    if 2 in tags.get(339, ()):
        raise ImageError("not_an_image", "a TIFF must have unsigned values, this one has signed")
    if image.mode.startswith("I;16") and tags.get(262) == 0:
        raise ImageError(
            "not_an_image", "in a 16-bit greyscale TIFF, 0 must be black: in this one it is white"
        )


def _scale_key(image: Image.Image, stored: str) -> None:
    """Give the transparent colour of a PNG in the values that Pillow gives its pixels.

    Args:
        image: that is opened; it is changed.
        stored: Pillow's description of the values in the file.

    Raises:
        ImageError: pixels of 16-bit colour keep their high bytes alone, so they cannot be compared.
    """
    key = image.info.get("transparency")
    bits = re.search(r"'L;([24])'", stored)
    if isinstance(key, int) and bits is not None:
        image.info["transparency"] = key * 255 // (2 ** int(bits[1]) - 1)
    if isinstance(key, tuple) and ";16" in stored:
        raise ImageError(
            "not_an_image", "a transparent colour needs 8 bits per value, this image has 16"
        )


def scaled_key(image: Image.Image) -> Image.Image:
    """The image with its transparent colour as :func:`_scale_key` gives it; the given one stays.

    Args:
        image: that somebody opened. Once its pixels are loaded, a key of 2 or 4 bits is like one of
            8 bits.

    Raises:
        ImageError: the transparent colour is one of 16 bits per value.
    """
    key, stored = image.info.get("transparency"), str(getattr(image, "tile", [])[:1])
    if key is None:
        return image
    if isinstance(key, tuple) and max(key) > 255:  # of a loaded image
        stored = ";16"
    changed = image.copy()  # which loads it
    _scale_key(changed, stored)
    return changed


def _rgb(image: Image.Image, notes: list[str], scale: int) -> np.ndarray:
    """Convert to RGB block by block: some modes need several copies of the pixels.

    Args:
        image: any.
        notes: to which those on its mode are added.
        scale: by what both sides are divided; an image that is reduced must be narrower than a
            block.
    """
    columns = min(image.width, _BLOCK_PIXELS)
    rows = max(1, _BLOCK_PIXELS // columns // scale * scale)
    if scale == 1 and image.height <= rows and image.width == columns:
        return np.asarray(_to_rgb(image, notes))
    pixels = np.empty((-(-image.height // scale), -(-image.width // scale), 3), np.uint8)
    said: list[str] = []
    for top in range(0, image.height, rows):
        for left in range(0, image.width, columns):
            said = []
            right, bottom = min(left + columns, image.width), min(top + rows, image.height)
            block = _to_rgb(image.crop((left, top, right, bottom)), said).reduce(scale)
            end = top // scale + block.height
            pixels[top // scale : end, left : left + columns] = np.asarray(block)
    notes += said
    return pixels


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        notes.append("converted from 16-bit greyscale to 8 bits")
        values = np.asarray(image)
        eight = np.clip(values >> 8, 0, 255).astype(np.uint8)
        if isinstance(key := image.info.get("transparency"), int):
            notes.append("alpha composited on white")
            eight[values == key] = 255
        return Image.fromarray(eight).convert("RGB")
    if image.has_transparency_data:
        notes.append("alpha composited on white")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if mode != "RGB":
        notes.append(f"converted from {mode} to RGB")
    return image.convert("RGB")
