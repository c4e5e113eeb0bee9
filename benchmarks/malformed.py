"""Requests that are broken in thousands of ways, the same for the same seed: mutated files, arrays,
JSON and forms.

``python -m benchmarks.malformed BUNDLE`` sends them to a service beside good traffic, and says what
became of both.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

OPERATIONS = ("score", "encode", "reconstruct", "sample")
FORMATS = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "TIFF": "image/tiff",
    "BMP": "image/bmp",
}
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    -0.0,
    1e308,
    10**30,
    0.5,
    "",
    "x",
    "NaN",
    "\u0000",
    "𝄞" * 40,
    [],
    {},
    [[]],
    {"a": 1},
)
PARAMETERS = (
    "n",
    "seed",
    "index",
    "temperature",
    "kind",
    "latents",
    "format",
    "samples",
    "alpha",
    "fdr",
    "explain",
    "map",
    "resize",
    "images",
    "unknown",
)
TYPES = (
    *FORMATS.values(),
    "application/json",
    "application/x-npy",
    "text/plain",
    "",
    "multipart/form-data",
    "x",
)
SHAPES = (
    "(2, 32, 32, 3)",
    "(2, 32, 32)",
    "(-2, 32, -32, 3)",
    "(99999999999, 32, 32, 3)",
    "(0, 32, 32, 3)",
    "()",
    "(2, 32, 32, 3",
    "2",
    "'a'",
    "(2, 32, 32, 3.5)",
    "(" * 500,
    "(257, 1, 1, 3)",
    "(2, 32, 32, 4)",
)
WORDS = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00", b"\x00\x00\xff\xff")
TEXTS = (
    b"[" * 50_000,
    b'{"a":' * 5_000,
    b'{"images": ["' + b"A" * 100_000,
    b"\xff\xfe{}",
    b"nul",
    b"{,}",
)
RATE = 100.0  # a second, beside good traffic
GOOD_CLIENTS = 4


@dataclass(frozen=True)
class Request:
    """``kind`` says what was broken."""

    kind: str
    operation: str
    content_type: str
    body: bytes


def malformed_requests(seed: int, count: int) -> Iterator[Request]:
    """Most of them malformed, some by chance still good."""
    rng = random.Random(seed)
    makers = (_file, _file, _array, _json, _form)
    for _ in range(count):
        made = rng.choice(makers)(rng)
        if rng.random() < 0.1:  # not what it says it is
            made = Request(made.kind, made.operation, rng.choice(TYPES), made.body)
        yield made


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, cut, doubled, moved or put in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        if not out:
            break
        at = rng.randrange(
            min(len(out), rng.choice((16, 64, 10**9)))
        )  # headers more often than the rest
        what = rng.randrange(6)
        if what == 0:
            out[at] = rng.randrange(256)
        elif what == 1:
            out[at] ^= 1 << rng.randrange(8)
        elif what == 2:
            del out[at : at + rng.randrange(1, 40)]
        elif what == 3:
            out[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif what == 4:
            out[at : at + 4] = rng.choice(WORDS)
        else:
            out[at:at] = out[at : at + rng.randrange(1, 200)]
    return bytes(out[: rng.randrange(len(out) + 1)] if rng.random() < 0.2 else out)


def _picture(rng: random.Random, kind: str) -> bytes:
    pixels = np.random.default_rng(rng.randrange(100)).integers(
        0, 256, (32, rng.choice((32, 32, 31, 90)), 3), np.uint8
    )
    out = io.BytesIO()
    Image.fromarray(pixels // 8 * 8).save(out, kind)
    return out.getvalue()


def _file(rng: random.Random) -> Request:
    kind = rng.choice(tuple(FORMATS))
    return Request(
        kind, rng.choice(OPERATIONS[:3]), FORMATS[kind], mutate(rng, _picture(rng, kind))
    )


def _array(rng: random.Random) -> Request:
    shape = rng.choice(SHAPES)
    kind = rng.choice(("|u1", "|O", "<f8", ">u2", "|V3", "<M8[s]", "zz", "|S6144", "<c16", "|b1"))
    header = f"{{'descr': '{kind}', 'fortran_order': {rng.choice(('False', 'True', '0', 'None'))}, 'shape': {shape}, }}"
    text = header.encode() + b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    size = len(text) if rng.random() < 0.8 else rng.randrange(65536)
    version = rng.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x09\x00"))
    body = (
        b"\x93NUMPY"
        + version
        + size.to_bytes(2 if version[0] == 1 else 4, "little")
        + text
        + rng.randbytes(rng.choice((6144, 6144, 0, 100)))
    )
    body = mutate(rng, body) if rng.random() < 0.3 else body
    return Request("npy", rng.choice(OPERATIONS[:3]), "application/x-npy", body)


def _json(rng: random.Random) -> Request:
    if rng.random() < 0.1:
        body = rng.choice(TEXTS)
        return Request("json", rng.choice(OPERATIONS), "application/json", body)
    value: dict[str, Any] = {
        name: rng.choice(VALUES) for name in rng.sample(PARAMETERS, rng.randrange(1, 5))
    }
    if rng.random() < 0.6:
        files = [
            mutate(rng, _picture(rng, rng.choice(tuple(FORMATS)))) for _ in range(rng.randrange(4))
        ]
        value["images"] = [*(base64.b64encode(file).decode() for file in files), rng.choice(VALUES)]
    body = json.dumps(value).encode()
    return Request(
        "json",
        rng.choice(OPERATIONS),
        "application/json",
        mutate(rng, body) if rng.random() < 0.4 else body,
    )


def _form(rng: random.Random) -> Request:
    boundary = "b" * rng.choice((1, 8, 70))
    parts = []
    for _ in range(rng.randrange(5)):
        name = rng.choice(
            (*PARAMETERS, "image", "image0", "image99999999999999999999", "image-1", "", 'a"b', "é")
        )
        file = rng.random() < 0.5
        content = mutate(rng, _picture(rng, "PNG")) if file else str(rng.choice(VALUES)).encode()
        kind = rng.choice(
            (
                "",
                "Content-Type: application/json\r\n",
                "Content-Type: text/plain; charset=x\r\n",
                "Content-Transfer-Encoding: base64\r\n",
            )
        )
        parts.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'.encode()
            + (b'; filename="a.png"' if file else b"")
            + b"\r\n"
            + kind.encode()
            + b"\r\n"
            + content
            + b"\r\n"
        )
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    return Request(
        "form",
        rng.choice(OPERATIONS),
        f"multipart/form-data; boundary={boundary}",
        mutate(rng, body) if rng.random() < 0.4 else body,
    )


def main() -> None:
    from benchmarks.traffic import Tally, Traffic, known_requests, new_session, running
    from serving.engine.bundle import open_bundle

    parser = argparse.ArgumentParser(description="Broken requests beside good traffic.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found: Counter[tuple[str, str]] = Counter()

    async def send(session: Any, url: str, request: Request) -> None:
        async with session.post(
            f"{url}/{request.operation}",
            data=request.body,
            headers={"Content-Type": request.content_type},
        ) as answer:
            await answer.read()
            found[request.kind, str(answer.status)] += 1

    async def good_alone(url: str, known: Any, seconds: float) -> Tally:
        async with Traffic(url, known, GOOD_CLIENTS, pause=0.1) as traffic:
            await asyncio.sleep(seconds)
        return traffic.tally

    async def both(url: str, known: Any) -> Tally:
        async with (
            Traffic(url, known, GOOD_CLIENTS, pause=0.1) as traffic,
            new_session() as session,
        ):
            tasks = []
            for request in malformed_requests(args.seed, args.count):
                tasks.append(asyncio.create_task(send(session, url, request)))
                await asyncio.sleep(1 / RATE)
            await asyncio.gather(*tasks)
        return traffic.tally

    with running(args.bundle) as service:
        known = known_requests(service.url, open_bundle(args.bundle).image_shape)
        asyncio.run(good_alone(service.url, known, 5))
        workers = service.workers()
        alone = [asyncio.run(good_alone(service.url, known, 20))]
        beside = asyncio.run(both(service.url, known))
        alone.append(asyncio.run(good_alone(service.url, known, 20)))
        kinds = sorted({kind for kind, _ in found})
        print(
            "| broken | " + " | ".join(statuses := sorted({status for _, status in found})) + " |"
        )
        print("|---" * (len(statuses) + 1) + "|")
        for kind in kinds:
            print(
                f"| {kind} | " + " | ".join(str(found[kind, status]) for status in statuses) + " |"
            )
        for name, tallies in (("alone", alone), ("beside them", [beside])):
            latencies = np.concatenate([t.latencies for t in tallies])
            outcomes = sum((t.outcomes for t in tallies), Counter())
            print(
                f"good traffic {name}: {dict(outcomes)}, p50 {1000 * np.median(latencies):.0f} ms, "
                f"p99 {1000 * np.quantile(latencies, 0.99):.0f} ms"
            )
        same = service.workers() == workers
        print(f"workers: {'the same as before, all ready' if same else 'not the same as before'}")


if __name__ == "__main__":
    main()
