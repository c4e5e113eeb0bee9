"""Converts image files to uint8 arrays and back. Limits are checked before decoding."""

from __future__ import annotations

import io
import math
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, PngImagePlugin, features

from ade_base.pictures.decoder_process import DecodedImage as DecodedImage
from ade_base.pictures.decoder_process import decode
from ade_base.pictures.decoders import decode_apart
from ade_base.pictures.structure import ImageError as ImageError
from ade_base.pictures.structure import read_structure

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 16_000_000  # 48 MB decoded
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
    if width * height > MAX_PIXELS:
        raise ImageError(
            "too_large",
            f"an image may have at most {MAX_PIXELS} pixels, this one has {width} x {height}",
        )
    if size is not None and (width, height) not in (size, size[::-1]):
        raise ImageError(
            "wrong_size",
            f"images must be {size[0]} x {size[1]} pixels, got {width} x {height}; "
            f"{RESIZING} resizes them",
        )
    return (decode if structure.is_plain else decode_apart)(data, structure)


def resize_centre(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop the centre of uint8 ``(H, W, C)`` to an aspect ratio and resize it with antialiasing.

    Returns:
        uint8 ``(height, width, C)``; an image of that size is returned as it is.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    scale = min(pixels.shape[0] / height, pixels.shape[1] / width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (pixels.shape[0] - rows) // 2, (pixels.shape[1] - columns) // 2
    crop = pixels[top : top + rows, left : left + columns]
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in crop.transpose(2, 0, 1)]
    resized = [plane.resize((width, height), Image.Resampling.LANCZOS) for plane in planes]
    return np.stack([np.asarray(plane) for plane in resized], axis=2)


def psnr(image: np.ndarray, reconstruction: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio of uint8 images, decibels.

    Returns:
        The ratio; ``None`` where the two are equal, since it is infinite then.

    Raises:
        ValueError: the two have different shapes.
    """
    if image.shape != reconstruction.shape:
        raise ValueError(
            f"both images must have one shape, got {image.shape} and {reconstruction.shape}"
        )
    error = float(np.square(image.astype(np.float64) - reconstruction).mean())
    return 10 * math.log10(255.0**2 / error) if error > 0 else None


def write_png(pixels: np.ndarray, text: dict[str, str] | None = None) -> bytes:
    """Encode uint8 ``(H, W, 1 or 3)`` as a PNG file with text keys."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    out = io.BytesIO()
    squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    Image.fromarray(squeezed).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def coder_version() -> str:
    """Version of libwebp; the results of :func:`lossless_bits` may depend on it."""
    return str(features.version("webp"))


def lossless_bits(pixels: np.ndarray) -> float:
    """Bits per value of uint8 ``(H, W, C)`` as lossless WebP, at its fastest setting.

    For small photographs this is within 4 % of the slowest setting, in a tenth of the time, and a
    fifth shorter than PNG. Unless there are three channels, each is coded as a grey image.
    """
    planes = [pixels] if pixels.shape[2] == 3 else list(pixels.transpose(2, 0, 1))
    size = 0
    for plane in planes:
        out = io.BytesIO()
        Image.fromarray(plane).convert("RGB").save(out, "WEBP", lossless=True, method=0)
        size += out.tell()
    return 8.0 * size / pixels.size


def untile(picture: np.ndarray, count: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Undo :func:`tile`: the ``count`` images of ``shape``, uint8 ``(count, H, W, C)``."""
    height, width, channels = shape
    grid = picture.reshape(
        picture.shape[0] // height, height, picture.shape[1] // width, width, channels
    ).swapaxes(1, 2)
    return grid.reshape(-1, height, width, channels)[:count]


def tile(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Arrange uint8 ``(N, H, W, C)`` in a grid, ``(rows * H, columns * W, C)``.

    The grid is as square as possible unless ``columns`` is given. Unused cells are white.
    """
    n, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    cells = np.full((rows * columns, height, width, channels), 255, np.uint8)
    cells[:n] = images
    grid = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)
