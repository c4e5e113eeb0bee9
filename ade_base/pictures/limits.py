"""The limits of image files, and how they are counted."""

from __future__ import annotations

from dataclasses import dataclass

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
SCALED = ("JPEG", "HEIF")  # formats whose large images are decoded at a reduced size
MIN_SCALED_SIDE = 1024  # that both sides keep; encoders look at 224 to 896 pixels per side
USUAL_PIXELS = 16_000_000  # 48 MB decoded; cost limits of larger images grow in proportion
MAX_METADATA_BYTES = 4 * 2**20  # profiles, XMP and thumbnails; some photographs have megabytes
MAX_PARTS = 10_000  # chunks or segments: 16 MiB in PNG chunks of 8 KiB are 2,048
MAX_GIF_BLOCKS = 2**17  # 16 MiB in blocks of 255 bytes are 65,793
MAX_COMMENT_BYTES = 2**16  # of a GIF: Pillow joins comments in quadratic time
MAX_JUNK_BYTES = 2**16  # between segments, read byte by byte
MAX_TABLE_BYTES = 2**16  # of a JPEG: four quantisation and eight Huffman tables have 4 KiB
MAX_SCANS = 100  # of a JPEG: each goes over the whole picture; libjpeg's progressive files have 10
MAX_TAGS = 500  # of a directory
MAX_STRIPS = 2**16
# Pillow sorts out uncompressed strips in Python: they may be short only in a large image.
UNCOMPRESSED_STRIPS, PIXELS_A_STRIP = 4096, 256
MAX_TILE_PIXELS = 2**20  # of a TIFF whose image is smaller than its tiles
MAX_EXIF_PREFIXES = 8  # Pillow strips them one by one, in quadratic time
MAX_EXIF_SEGMENTS = 100  # of a JPEG, also joined in quadratic time; 4 MiB need 65
MAX_CODED_PIXELS = 2**22  # of small AVIF and HEIC images, with the tiles that they consist of
MAX_ITEM_DEPTH = 5  # a tone map of a grid of tiles has three levels
MAX_DIRECTORIES = 8  # of a TIFF image: its own, Exif, GPS and interoperability
# Limits of files that are decoded in this process: small images in simple formats, with little
# metadata.
PLAIN_PIXELS = 2**20
PLAIN_BYTES = 2**20
PLAIN_METADATA_BYTES = 2**16
PLAIN_SCANS = 4  # of a JPEG: one for each component
PLAIN_LOSSLESS_PIXELS = 2**16  # of a WebP, whose codes may take 90 KB for each 16 pixels
# Bytes of a lossless WebP beside four for each pixel: libwebp's files of noise have up to 250. More
# are codes of pixels that it does not have, a thousand times as slow to read as others.
MAX_CODE_BYTES = 2**10


class ImageError(ValueError):
    """The file is not a usable image.

    ``code`` is ``not_an_image``, ``too_large`` or ``wrong_size``. ``is_transient`` tells that the
    machine may be the cause, so that another attempt may succeed.
    """

    def __init__(self, code: str, message: str, is_transient: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.is_transient = is_transient


@dataclass(frozen=True)
class Structure:
    """Format and size according to the file itself.

    Attributes:
        format: one of :data:`FORMATS`.
        width: in pixels.
        height: in pixels.
        is_plain: whether the file is small and in a simple format whose decoding cost is bounded by
            the size.
        bits: per value, if the file tells; 0 otherwise.
    """

    format: str
    width: int
    height: int
    is_plain: bool = False
    bits: int = 0

    @property
    def scale(self) -> int:
        """By what the sides are divided, rounded up: 1, 2, 4 or 8."""
        most = min(self.width, self.height) // MIN_SCALED_SIDE if self.format in SCALED else 1
        return next(scale for scale in (8, 4, 2, 1) if scale <= max(most, 1))

    @property
    def scaled_pixels(self) -> int:
        """Number of pixels after decoding."""
        return -(-self.width // self.scale) * -(-self.height // self.scale)

    @property
    def effort(self) -> float:
        """By what the limits of processor time and scans are multiplied."""
        return min(max(1.0, self.width * self.height / USUAL_PIXELS), 4.0)


def too_large(what: str, count: int, limit: int) -> ImageError:
    return ImageError(
        "too_large", f"an image file may have at most {limit} {what}, this one has {count} or more"
    )


def is_plain(data: bytes, width: int, height: int, metadata: int = 0) -> bool:
    return (
        width * height <= PLAIN_PIXELS
        and len(data) <= PLAIN_BYTES
        and metadata <= PLAIN_METADATA_BYTES
    )


class Count:
    """Counts the items of one kind and raises above the limit."""

    def __init__(self, what: str, limit: int) -> None:
        self.total = 0
        self._what = what
        self._limit = limit

    def add(self, count: int) -> None:
        self.total += count
        if self.total > self._limit:
            raise too_large(self._what, self.total, self._limit)
