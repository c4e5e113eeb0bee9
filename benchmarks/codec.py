"""Size and speed of lossless coding, beside other lossless coders, on the same images.

    python -m benchmarks.codec BUNDLE IMAGES [--images N] [--into PAGE.md]

IMAGES is a folder or a .npy file. The table is printed, or replaces the one between the two marks
of a page. Speeds are megabytes of raw pixels per second of processor time on one core, as if all
cores were free: programs that run beside make them lower. zstandard and pillow-jxl-plugin are left
out where they are not installed.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from export.write import add_graphs
from extensions.codec import sources
from extensions.codec.compress import compress
from extensions.codec.decompress import decompress
from extensions.codec.lattice import Rotation
from extensions.codec.networks import CODEC_NAME, Networks
from extensions.codec.sources import ArraySource, open_source
from extensions.codec.stack import Stack
from serving.engine.bundle import open_bundle

STRIP = 500  # images in one picture, as whole data sets are stored
MIN_IMAGES = 64  # a chunk begins with some that the model does not code
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
    for method in (4, 6):  # quality is the effort here
        webp = pillow("WEBP", lossless=True, method=method, quality=100)
        yield f"WebP, lossless, method {method}", True, *webp
    yield f"WebP, method 6, {STRIP} images in one", False, *webp
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not open_bundle(bundle_folder).has(CODEC_NAME):
            add_graphs(bundle_folder, folder / "bundle", ["codec"], ValueError)
            bundle_folder = folder / "bundle"
        bundle = open_bundle(bundle_folder)
        np.save(folder / "images.npy", images)
        source = ArraySource(folder / "images.npy")
        with timed() as encoding:
            start = time.process_time()
            report = compress(source, folder / "images.ade", bundle)
            encode = time.process_time() - start - report.checking_seconds
        with timed() as decoding:
            start = time.process_time()
            decompress(folder / "images.ade", folder / "back.npy", bundle)
            decode = time.process_time() - start
        assert np.array_equal(np.load(folder / "back.npy"), images)
    f = report.figures
    values = report.dims * f.coded
    bound, net, whole = f.bound_bits / values, f.coded_bits / values, report.whole_rate
    rows = [
        Row(
            "**AV-ADE, the whole archive**",
            8 * report.archive_bytes / images.size,
            megabytes / encode,
            megabytes / decode,
        ),
        Row("bound of `ade score` for the images that the model codes", bound, None, None),
        Row(f"their net rate ({100 * (net / bound - 1):+.2f} %)", net, None, None),
        Row(
            f"with initial bits and headers ({100 * (whole / bound - 1):+.2f} %)", whole, None, None
        ),
    ]
    about = (
        f"{len(images)} images, bundle `{bundle.model_id}`; {f.coded} coded by the model, "
        f"{f.initial} stored as initial bits, {f.images - f.coded - f.initial} stored because "
        f"that is smaller. {processor()}; one thread, other programs running beside: load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.\n\n"
        f"Encoding an image takes {shares(encoding, encode, len(images))}. "
        f"Decoding takes {shares(decoding, decode, len(images))}."
    )
    return rows, about


PARTS: dict[str, list[tuple[Any, str]]] = {
    "networks": [(Networks, "run")],
    "rotations": [(Rotation, "forward"), (Rotation, "inverse")],
    "Gaussians": [
        (Stack, name)
        for name in ("draw_gaussian", "undraw_gaussian", "push_gaussian", "pop_gaussian")
    ],
    "uniform draws": [
        (Stack, name) for name in ("pop_uniform", "push_uniform", "pop_bits", "push_bits")
    ],
    "lossless WebP, to compare": [(sources, "to_webp")],
}


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Measure the processor time of the coder's parts, in seconds."""
    seconds = dict.fromkeys(PARTS, 0.0)
    before = {(owner, name): getattr(owner, name) for ps in PARTS.values() for owner, name in ps}
    inside = [False]

    def wrap(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:  # a Gaussian's uniform draws belong to it
                return method(*args, **kwargs)
            inside[0] = True
            start = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                seconds[part] += time.thread_time() - start
                inside[0] = False

        return wrapped

    try:
        for part, methods in PARTS.items():
            for owner, name in methods:
                setattr(owner, name, wrap(part, before[owner, name]))
        yield seconds
    finally:
        for (owner, name), method in before.items():
            setattr(owner, name, method)


def shares(seconds: dict[str, float], total: float, count: int) -> str:
    """How much of the time each part takes."""
    listed = ", ".join(
        f"{part} {100 * share / total:.0f} %"
        for part, share in seconds.items()
        if share > 0.01 * total
    )
    return f"{1e3 * total / count:.0f} ms of processor time: {listed}"


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
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="the first N")
    parser.add_argument("--into", type=Path, metavar="PAGE.md")
    args = parser.parse_args()
    source = open_source(args.source)
    pictures = [source.read(i).pixels for i in range(min(args.images, source.count))]
    shape = open_bundle(args.bundle).image_shape
    usable = [pixels for pixels in pictures if pixels is not None and pixels.shape == shape]
    if len(usable) < MIN_IMAGES:
        parser.error(
            f"IMAGES must hold at least {MIN_IMAGES} PNG images of {shape[1]} x {shape[0]} "
            f"pixels and {shape[2]} channels, got {len(usable)} of {source.count}"
        )
    images = np.stack(usable)
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
