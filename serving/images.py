"""Image files to uint8 arrays and back, with limits that hold before anything is decoded."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError, features

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 16_000_000  # decoded, this is 48 MB; a larger picture of another size is of no use to a small model
MAX_FILE_BYTES = 16 * 2**20


class ImageError(ValueError):
    """A file that is no usable image. ``code`` is ``not_an_image``, ``too_large`` or ``wrong_size``."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class DecodedImage:
    """Pixels of a file, uint8 ``(H, W, 3)``, and what was done to get them."""

    pixels: np.ndarray
    notes: list[str] = field(default_factory=list)


def file_size(file: Path | io.BytesIO) -> tuple[int, int] | None:
    """Width and height that a file says it has, undecoded; ``None`` of what is no image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                return image.size
    except Exception:  # whatever Pillow's parsers stumble over: decoding will say so
        return None


def header_pixels(data: bytes) -> int:
    """The same multiplied; 0 of what is no image."""
    width, height = file_size(io.BytesIO(data)) or (0, 0)
    return width * height


def read_image(data: bytes, size: tuple[int, int] | None = None) -> DecodedImage:
    """Decode an image file to RGB.

    EXIF orientation is applied, alpha is composited on white, 16-bit samples keep their high byte, the
    first frame of an animation is taken; each is noted.

    Args:
        data: the whole file.
        size: width and height; a picture of another size (EXIF may turn it) is refused by its header, undecoded.

    Raises:
        ImageError: not an image of a known format, damaged, too large, or of another size.
        MemoryError: there is no room to decode it.
    """
    if not data:
        raise ImageError("not_an_image", "the image is empty: 0 bytes came")
    if len(data) > MAX_FILE_BYTES:
        raise ImageError("too_large", f"an image file may have {MAX_FILE_BYTES} bytes, this one has {len(data)}")
    notes: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged metadata, which does no harm here
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ImageError("too_large", f"an image may have {MAX_PIXELS} pixels, this one has "
                                              f"{image.width} x {image.height}")
            if size is not None and image.size not in (size, size[::-1]):
                raise ImageError("wrong_size", f"images must be {size[0]} x {size[1]} pixels, got {image.width} x "
                                               f"{image.height}; \"resize\": \"fit\" resizes them")
            if ";16" in str(image.tile) and not image.mode.startswith("I"):
                notes.append("converted from 16-bit colour to 8 bits")
            if getattr(image, "is_animated", False):  # how many there are is dear to count
                notes.append("first of several frames taken")
                image.seek(0)
            image.load()
            turned = ImageOps.exif_transpose(image)
            if turned is not image and image.getexif().get(0x0112, 1) != 1:
                notes.append("EXIF orientation applied")
            return DecodedImage(np.asarray(_to_rgb(turned, notes)), notes)
    except UnidentifiedImageError:
        raise ImageError("not_an_image", f"not an image: expected {', '.join(FORMATS)}, got {len(data)} bytes that "
                                         f"start with {data[:8].hex(' ')}") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"an image may have {MAX_PIXELS} pixels: {error}") from None
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow raises whatever its parsers stumble over: struct.error, SyntaxError, KeyError, …
        raise ImageError("not_an_image", f"the image is damaged: {error}") from error


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        notes.append("converted from 16-bit greyscale to 8 bits")
        values = np.asarray(image)
        if mode == "F":
            eight = np.clip(np.nan_to_num(values), 0, 255).astype(np.uint8)
        else:
            eight = np.clip(values >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(eight).convert("RGB")
    if image.has_transparency_data:
        notes.append("alpha composited on white")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if mode != "RGB":
        notes.append(f"converted from {mode} to RGB")
    return image.convert("RGB")


def write_png(pixels: np.ndarray, text: dict[str, str] | None = None) -> bytes:
    """A PNG file of uint8 ``(H, W, 1 or 3)`` with text keys."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    out = io.BytesIO()
    squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    Image.fromarray(squeezed).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def coder_version() -> str:
    """Of the library that :func:`lossless_bits` codes with: another one's lengths may differ."""
    return str(features.version("webp"))


def lossless_bits(pixels: np.ndarray) -> float:
    """Bits per value of a lossless code of uint8 ``(H, W, C)``: WebP's, at its quickest setting.

    It is within 4 % of the slowest setting's length, in a tenth of the time, and a fifth shorter than PNG's for small
    photographs. Channels that are not three are coded as so many grey images.
    """
    planes = [pixels] if pixels.shape[2] == 3 else list(pixels.transpose(2, 0, 1))
    size = 0
    for plane in planes:
        out = io.BytesIO()
        Image.fromarray(plane).convert("RGB").save(out, "WEBP", lossless=True, method=0)
        size += out.tell()
    return 8.0 * size / pixels.size


def untile(picture: np.ndarray, count: int, shape: tuple[int, int, int]) -> np.ndarray:
    """The ``count`` images of ``shape`` that :func:`tile` laid out; uint8 ``(count, H, W, C)``."""
    height, width, channels = shape
    grid = picture.reshape(picture.shape[0] // height, height, picture.shape[1] // width, width, channels).swapaxes(1, 2)
    return grid.reshape(-1, height, width, channels)[:count]


def tile(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """uint8 ``(N, H, W, C)`` to one picture ``(rows H, columns W, C)``, as square as may be; spare cells white."""
    n, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    cells = np.full((rows * columns, height, width, channels), 255, np.uint8)
    cells[:n] = images
    grid = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)
