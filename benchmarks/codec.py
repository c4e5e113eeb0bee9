"""Size and speed of lossless coding, beside other lossless coders, on the same images.

    python -m benchmarks.codec BUNDLE IMAGES [--images N] [--into PAGE.md]

IMAGES is a folder or a .npy file. The table is printed, or replaces the one between the two marks
of a page. Speeds are megabytes of raw pixels per second of processor time on one core. zstandard
and pillow-jxl-plugin are left out where they are not installed.
"""

from __future__ import annotations

import argparse
import io
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coding.compress import compress
from coding.decompress import decompress
from coding.sources import ArraySource, open_source
from export.codec import add_codec
from serving.engine.bundle import CODEC_NAME, open_bundle

STRIP = 500  # images in one picture, as whole data sets are stored
MARKS = ("<!-- table of benchmarks/codec.py -->", "<!-- end of the table -->")


@dataclass(frozen=True)
class Row:
    """Bits per dimension, and MB of pixels per second of processor time."""

    name: str
    rate: float
    encode: float | None
    decode: float | None


def pillow(format: str, **options: Any) -> tuple[Callable[..., bytes], Callable[..., np.ndarray]]:
    def encode(pixels: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format, **options)
        return out.getvalue()

    return encode, lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def coders() -> Iterator[tuple[str, bool, Callable[..., bytes], Callable[..., np.ndarray]]]:
    """Name, whether each image is a file of its own, encoder and decoder."""
    yield "PNG, `optimize`", True, *pillow("PNG", optimize=True)
    yield "WebP, lossless, method 4", True, *pillow("WEBP", lossless=True, method=4, quality=100)
    yield "WebP, lossless, method 6", True, *pillow("WEBP", lossless=True, method=6)
    yield f"WebP, method 6, {STRIP} images in one", False, *pillow("WEBP", lossless=True, method=6)
    try:
        import pillow_jxl  # noqa: F401  # registers the format
    except ImportError:
        print("pillow-jxl-plugin is not installed: no JPEG XL", file=sys.stderr)
    else:
        jxl = pillow("JXL", lossless=True, effort=7)
        yield "JPEG XL, lossless, effort 7", True, *jxl
        yield f"JPEG XL, effort 7, {STRIP} images in one", False, *jxl
    try:
        import zstandard
    except ImportError:
        print("zstandard is not installed: no zstd", file=sys.stderr)
    else:

        def decode(data: bytes) -> np.ndarray:
            return np.frombuffer(zstandard.decompress(data), np.uint8)

        def encode(pixels: np.ndarray) -> bytes:
            return zstandard.compress(pixels.tobytes(), 19)

        yield f"zstd, level 19, {STRIP} images in one", False, encode, decode


def measure_coder(
    images: np.ndarray, single: bool, encode: Callable[..., bytes], decode: Callable[..., Any]
) -> tuple[float, float, float]:
    """Bytes, and seconds of processor time to encode and to decode."""
    strips = [images[i : i + STRIP] for i in range(0, len(images), STRIP)]
    parts = list(images) if single else [s.reshape(-1, *images.shape[2:]) for s in strips]
    start = time.process_time()
    files = [encode(part) for part in parts]
    middle = time.process_time()
    decoded = [decode(file) for file in files]
    end = time.process_time()
    for part, found in zip(parts, decoded, strict=True):
        assert np.array_equal(part.ravel(), found.ravel())
    return sum(map(len, files)), middle - start, end - middle


def measure_model(bundle_folder: Path, images: np.ndarray) -> tuple[list[Row], str]:
    """The model's rows, and what its archive consists of."""
    megabytes = images.nbytes / 1e6
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not open_bundle(bundle_folder).has(CODEC_NAME):
            add_codec(bundle_folder, folder / "bundle", ValueError)
            bundle_folder = folder / "bundle"
        bundle = open_bundle(bundle_folder)
        np.save(folder / "images.npy", images)
        source = ArraySource(folder / "images.npy")
        start = time.process_time()
        report = compress(source, folder / "images.ade", bundle, verify=False)
        middle = time.process_time()
        decompress(folder / "images.ade", folder / "back.npy", bundle)
        end = time.process_time()
        assert np.array_equal(np.load(folder / "back.npy"), images)
        size = (folder / "images.ade").stat().st_size
        figures = report.figures
        bound, net = figures.bound_bits / figures.values, figures.coded_bits / figures.values
        rows.append(
            Row(
                "**AV-ADE, the whole archive**",
                8 * size / images.size,
                megabytes / (middle - start - report.bound_seconds),
                megabytes / (end - middle),
            )
        )
        rows.append(Row("AV-ADE, net rate of the images that the model codes", net, None, None))
        rows.append(Row("bound of `ade score` for the same images", bound, None, None))
    about = (
        f"{len(images)} images, bundle `{bundle.model_id}`; {figures.coded} coded by the model, "
        f"{figures.initial} stored as initial bits, "
        f"{figures.images - figures.coded - figures.initial} stored because that is smaller. "
        f"Net rate {net / bound - 1:+.2%} from the bound. {processor()}; one thread."
    )
    return rows, about


def measure_others(images: np.ndarray) -> Iterator[Row]:
    """The rows of the other coders."""
    megabytes = images.nbytes / 1e6
    for label, single, encode, decode in coders():
        size, encoding, decoding = measure_coder(images, single, encode, decode)
        yield Row(label, 8 * size / images.size, megabytes / encoding, megabytes / decoding)


def processor() -> str:
    """The name of the processor."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def table(rows: list[Row], about: str) -> str:
    lines = ["| | bits per dimension | encode, MB/s | decode, MB/s |", "|---|---|---|---|"]
    for row in rows:
        speeds = ["" if s is None else f"{s:.3g}" for s in (row.encode, row.decode)]
        lines.append(f"| {row.name} | {row.rate:.3f} | {speeds[0]} | {speeds[1]} |")
    return "\n".join([*lines, "", about])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("source", type=Path, metavar="IMAGES")
    parser.add_argument("--images", type=int, default=500, metavar="N", help="the first N")
    parser.add_argument("--into", type=Path, metavar="PAGE.md")
    args = parser.parse_args()
    source = open_source(args.source)
    pictures = [source.read(i).pixels for i in range(min(args.images, source.count))]
    images = np.stack([pixels for pixels in pictures if pixels is not None])
    rows, about = measure_model(args.bundle, images)
    for row in rows:
        print(row, file=sys.stderr)
    for row in measure_others(images):
        print(row, file=sys.stderr)
        rows.append(row)
    text = table(rows, about)
    print(text)
    if args.into:
        page = args.into.read_text()
        before, after = page.index(MARKS[0]) + len(MARKS[0]), page.index(MARKS[1])
        args.into.write_text(f"{page[:before]}\n{text}\n{page[after:]}")


if __name__ == "__main__":
    main()
