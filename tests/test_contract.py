"""The recorded contract: requests of docs/api.md get the answers in ``data/contract.json``.

The requests are below, as code; their answers are in the record, one line each. A failing request
means that clients see another answer. If that is intended, record again and read the diff line by
line before committing it::

    python -m tests.test_contract --record

Every engine of ``ade serve`` gives these answers.

In the environment of the recording (versions, processor), bodies are compared byte for byte.
Elsewhere rounding may differ: there, numbers are compared within a tolerance and pictures and
arrays by shape and mean, and everything else still exactly. In all environments, the bodies of
the engines that one run tests are compared byte for byte with each other: `make test` compares
TorchServe with ASGI, `make test-ray` all three.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from extensions.codec.networks import fingerprint
from handlers.launch.engines import DEFAULT, ENGINES
from serving.engine.bundle import open_bundle
from tests.helpers import DATA, PRETRAINED, ROOT, b64, npy, png_header
from tests.service import RunningService

RECORD = DATA / "contract.json"
EXAMPLES = ROOT / "serving" / "examples"
TOLERANCE = 1e-4
P_VALUE_TOLERANCE = 1e-3  # a p-value moves in steps of 1 / (n + 1)
LONG_LIST = 64  # numbers; a longer list is recorded by its shape and mean
PRESENT = "(any)"  # of a header whose value differs from request to request
VARYING = {"x-ade-batch", "server-timing"}
HEADERS = {"x-ade-model", "x-ade-backend", "x-ade-seed", "x-ade-psnr", "retry-after", *VARYING}
ENVIRONMENT_HEADERS = {"x-ade-backend", "x-ade-psnr"}  # may differ on another machine


@dataclass(frozen=True)
class Request:
    """One request: a body with its type, or the fields and files of a form."""

    operation: str
    content: bytes | None = None
    content_type: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    files: tuple[tuple[str, bytes], ...] = ()
    method: str = "POST"
    model: str | None = None  # that must answer

    def send(self, url: str) -> httpx.Response:
        options: dict[str, Any] = {"data": self.fields or None}
        if self.files:
            options["files"] = [
                (name, ("image", data, "application/octet-stream")) for name, data in self.files
            ]
        headers = {} if self.model is None else {"X-Ade-Model": self.model}
        if self.content is not None:
            options = {"content": self.content}
            headers["Content-Type"] = self.content_type
        return httpx.request(
            self.method,
            f"{url}/predictions/{self.operation}",
            headers=headers,
            timeout=120,
            **options,
        )


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def as_json(operation: str, **values: Any) -> Request:
    return Request(operation, json.dumps(values).encode(), "application/json")


def as_form(operation: str, *files: bytes, **fields: str) -> Request:
    names = [f"image{i or ''}" for i in range(len(files))]
    return Request(operation, fields=fields, files=tuple(zip(names, files, strict=True)))


def part(name: str, content: bytes, kind: str = "application/octet-stream") -> bytes:
    """One part of a form with the boundary ``x``."""
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"\r\nContent-Type: {kind}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def as_parts(body: bytes) -> Request:
    return Request("score", body, "multipart/form-data; boundary=x")


def latents(**values: float) -> list[dict[str, Any]]:
    """Of one image of the shipped bundle: each named array filled with its value."""
    shapes = json.loads((PRETRAINED / "manifest.json").read_text())["latent_shapes"]
    return [
        {
            "levels": [
                {name: np.full(shape, value).tolist() for name, value in values.items()}
                for shape in shapes
            ]
        }
    ]


CAT, DOG, SHIP = ((EXAMPLES / f"{name}.png").read_bytes() for name in ("cat", "dog", "ship"))
PICTURE = Image.open(io.BytesIO(CAT)).convert("RGB")
ARRAY = np.stack(
    [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (CAT, DOG, SHIP)]
)
WIDE = encoded(PICTURE.resize((80, 48), Image.Resampling.NEAREST))
IDENTITY = open_bundle(PRETRAINED).model_id
FLAT = encoded(Image.new("RGB", (32, 32), (90, 120, 200)))
TURNED = Image.Exif()
TURNED[0x0112] = 6
IMAGE_OPERATIONS = ("encode", "reconstruct", "score")


def requests() -> dict[str, Request]:
    """Every operation, way to send images, parameter, format and error of docs/api.md."""
    made = {
        "sample: empty object": as_json("sample", seed=1),
        "sample: grid": as_json("sample", n=5, seed=7),
        "sample: npy": as_json("sample", n=3, seed=7, index=2, format="npy"),
        "sample: json": as_json("sample", n=2, seed=7, format="json"),
        "sample: density": as_json("sample", n=2, seed=2**53, kind="density", format="npy"),
        "sample: temperature": as_json("sample", n=2, seed=3, temperature=0.7, kind="density"),
        "sample: a form": as_form("sample", n="2", seed="5", temperature="0.5", format="npy"),
        "sample: z": as_json("sample", latents=latents(z=0.25), seed=1, format="npy"),
        "sample: eps": as_json(
            "sample", latents=latents(eps=0.5), seed=1, kind="density", format="npy"
        ),
        "sample: latents as json": as_json("sample", latents=latents(z=0.1), seed=1, format="json"),
        "sample: latents as png": as_json("sample", latents={"results": latents(z=0.1)}, seed=1),
        "encode: json": Request("encode", CAT, "image/png"),
        "encode: seed": as_form("encode", CAT, DOG, seed="9"),
        "encode: eps": as_json("encode", images=[b64(CAT)], eps=True),
        "encode: npz": as_form("encode", CAT, DOG, format="npz"),
        "encode: npz with eps": as_form("encode", CAT, format="npz", eps="true"),
        "encode: resized": as_form("encode", WIDE, resize="fit", format="npz"),
        "encode: a bad image, json": as_json("encode", images=[b64(CAT), b64(b"junk")]),
        "encode: a bad image, npz": as_form("encode", CAT, b"junk", format="npz"),
        "encode: too many for json": Request("encode", npy(ARRAY[[0] * 17]), "application/x-npy"),
        "reconstruct: png": Request("reconstruct", CAT, "image/png"),
        "reconstruct: several": as_form("reconstruct", CAT, DOG),
        "reconstruct: npy": as_form("reconstruct", CAT, DOG, format="npy"),
        "reconstruct: density": as_form("reconstruct", CAT, kind="density", seed="4"),
        "reconstruct: one as json": as_form("reconstruct", CAT, format="json"),
        "reconstruct: resized": as_form("reconstruct", WIDE, resize="fit"),
        "reconstruct: a bad image": as_json("reconstruct", images=[b64(CAT), "&&&", 7, b64(WIDE)]),
        "reconstruct: a bad image, npy": as_form("reconstruct", CAT, b"junk", format="npy"),
        "reconstruct: several as png": as_form("reconstruct", CAT, DOG, format="png"),
        "score: file": Request("score", CAT, "image/png"),
        "score: any type": Request("score", CAT, "application/octet-stream"),
        "score: a form": as_form("score", CAT, DOG, SHIP, alpha="0.05"),
        "score: json": as_json("score", images=[b64(CAT), "data:image/png;base64," + b64(DOG)]),
        "score: npy": Request("score", npy(ARRAY), "application/x-npy"),
        "score: npy in a form": as_form("score", npy(ARRAY[:2]), seed="3"),
        "score: out of distribution": Request("score", FLAT, "image/png"),
        "score: samples": as_form("score", CAT, samples="4", seed="11"),
        "score: alpha too small": as_form("score", CAT, alpha="0.00001"),
        "score: fdr": as_json("score", images=[b64(CAT), b64(FLAT), b64(DOG)], fdr=0.1),
        "score: no reasons": as_form("score", CAT, explain="false"),
        "score: map": as_form("score", CAT, map="true", explain="false"),
        "score: resized": as_form("score", WIDE, CAT, resize="fit"),
        "score: a bad image": as_json(
            "score", images=[b64(CAT), b64(b"junk"), "&&&", None, b64(WIDE), b64(DOG)]
        ),
        "score: only bad images": as_json("score", images=[b64(b"junk"), b64(WIDE)]),
        "score: a repeated key": Request(
            "score",
            json.dumps({"images": [b64(CAT)], "alpha": 0.5}).encode()[:-1] + b', "alpha": 0.1}',
            "application/json",
        ),
        "score: put": Request("score", CAT, "image/png", method="PUT"),
        "score: of this model": Request("score", CAT, "image/png", model=IDENTITY),
        "score: of another model": Request("score", CAT, "image/png", model="other@1"),
        "score: get": Request("score", method="GET"),
        "score: delete": Request("score", method="DELETE"),
        "score: cut form": Request("score", b"--x\r\nnothing", "multipart/form-data; boundary=x"),
        "score: form with a field cut off": as_parts(part("image", CAT) + part("alpha", b"0.5")),
        "score: field after a form's end": as_parts(
            part("image", CAT) + b"--x--\r\n" + part("alpha", b"0.5") + b"--x--\r\n"
        ),
        "score: several files in a field": as_parts(
            part("image", CAT, "multipart/mixed; boundary=y") + b"--x--\r\n"
        ),
        "score: parameters in the query string": Request("score?alpha=0.5", CAT, "image/png"),
        "score: form without a boundary": Request("score", b"--x\r\n", "multipart/form-data"),
    }
    odd = {
        "jpeg": encoded(PICTURE, "JPEG", quality=95),
        "webp": encoded(PICTURE, "WEBP", lossless=True),
        "bmp": encoded(PICTURE, "BMP"),
        "gif": encoded(PICTURE.quantize(64), "GIF"),
        "tiff": encoded(PICTURE, "TIFF"),
        "turned": encoded(PICTURE, exif=TURNED),
        "cmyk": encoded(PICTURE.convert("CMYK"), "TIFF"),
        "16-bit": encoded(
            Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) * 257)
        ),
        "palette": encoded(PICTURE.quantize(32)),
        "alpha": encoded(PICTURE.convert("RGBA").rotate(20)),
        "grey": encoded(PICTURE.convert("L")),
        "animated": encoded(
            PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(90)], lossless=True
        ),
    }
    made |= {
        f"score: {name}": as_form("score", data, explain="false") for name, data in odd.items()
    }
    for operation in IMAGE_OPERATIONS:
        made |= {
            f"{operation}: {name}": request
            for name, request in {
                "empty body": Request(operation, b"", "image/png"),
                "empty object": as_json(operation),
                "no images": as_json(operation, images=[]),
                "junk": Request(operation, b"hello", "text/plain"),
                "wrong size": Request(operation, WIDE, "image/png"),
                "unknown parameter": as_form(operation, CAT, sede="1"),
                "bad seed": as_form(operation, CAT, seed="-1"),
                "bad format": as_form(operation, CAT, format="gif"),
            }.items()
        }
    bad_images = {
        "truncated": (CAT[:300], "image/png"),
        "bomb": (png_header(60000, 60000), "image/png"),
        "large body": (b"\0" * (16 * 2**20 + 1), "image/png"),
        "floats": (npy(np.full((1, 32, 32, 3), np.nan, np.float32)), "application/x-npy"),
        "dtype": (npy(ARRAY.astype(np.int64)), "application/x-npy"),
        "three axes": (npy(ARRAY[0]), "application/x-npy"),
        "channels": (npy(ARRAY[..., :1]), "application/x-npy"),
        "small array": (npy(ARRAY[:, :8]), "application/x-npy"),
        "objects": (npy(np.array([None], object), allow_pickle=True), "application/x-npy"),
        "cut array": (npy(ARRAY)[:-5], "application/x-npy"),
        "too many in an array": (npy(np.zeros((257, 1, 1, 3), np.uint8)), "application/x-npy"),
        "broken json": (b'{"images": [', "application/json"),
        "json list": (b"[1, 2]", "application/json"),
        "nested json": (b"[" * 50_000, "application/json"),
    }
    made |= {f"score: {name}": Request("score", *body) for name, body in bad_images.items()}
    made["score: too many images"] = as_json("score", images=[b64(CAT)] * 257)
    made["score: too many draws"] = as_json("score", images=[b64(CAT)] * 17, samples=64)
    made["score: images of another kind"] = as_json("score", images="abc")
    made["score: form without an image"] = as_form("score", alpha="0.5")
    made["score: too many pixels"] = as_form(
        "score", *[encoded(Image.new("L", (3900, 3900)))] * 5, resize="fit"
    )
    values: dict[str, list[Any]] = {
        "alpha": [0, 1.5, "x"],
        "fdr": [2],
        "samples": [0, 65, 1.5],
        "explain": ["yes"],
        "map": [1],
        "resize": ["crop"],
        "seed": [2**63, True],
        "format": ["npy"],
    }
    made |= {
        f"score: {name} {value!r}": as_json("score", images=[b64(CAT)], **{name: value})
        for name, bad in values.items()
        for value in bad
    }
    made["encode: eps 2"] = as_json("encode", images=[b64(CAT)], eps=2)
    made["reconstruct: kind 'x'"] = as_json("reconstruct", images=[b64(CAT)], kind="x")
    short = latents(z=0.0)[0]["levels"][:1]
    bad_sample: dict[str, dict[str, Any]] = {
        "n 0": {"n": 0},
        "n 257": {"n": 257},
        "seed -1": {"seed": -1},
        "seed 0.5": {"seed": 0.5},
        "temperature 0": {"temperature": 0},
        "temperature 11": {"temperature": 11},
        "kind 'x'": {"kind": "x"},
        "format 'gif'": {"format": "gif"},
        "index -1": {"index": -1},
        "unknown parameter": {"size": 64},
        "index beyond the last": {"index": 2**63 - 1, "n": 2},
        "latents and n": {"latents": latents(z=0.0), "n": 3},
        "latents and index": {"latents": latents(z=0.0), "index": 3},
        "latents and temperature": {"latents": latents(z=0.0), "temperature": 0.5},
        "latents of few levels": {"latents": [{"levels": short}]},
        "latents of text": {"latents": "x"},
        "no latents": {"latents": []},
        "large latents": {"latents": latents(z=2000.0)},
        "large eps": {"latents": latents(eps=2e6)},
        "too many latents": {"latents": [[]] * 257},
        "latents of another shape": {"latents": [[[0.0]] * len(latents(z=0.0)[0]["levels"])]},
    }
    made |= {f"sample: {name}": as_json("sample", **given) for name, given in bad_sample.items()}
    made["sample: empty body"] = Request("sample", b"", "application/json")
    made["sample: an image"] = Request("sample", CAT, "image/png")
    made["sample: json without its type"] = Request(
        "sample", b'{"n": 4}', "application/x-www-form-urlencoded"
    )
    return made


def servers_own() -> dict[str, Request]:
    """Requests that the model server answers by itself, before any handler of ours."""
    return {
        "unknown model": Request("other", CAT, "image/png"),
        "unknown version": Request("score/9.9", CAT, "image/png"),
        "malformed form": Request("score", b"a=%zz", "application/x-www-form-urlencoded"),
    }


REQUESTS, SERVERS_OWN = requests(), servers_own()
FIRST: dict[str, str] = {}  # SHA-256 of the first engine's answers, by request


def environment() -> dict[str, str]:
    """Everything that the bytes of an answer may depend on."""
    found = fingerprint()
    del found["constriction"]  # of the codec alone
    return {**found, "pillow": metadata.version("pillow")}


def observed(answer: httpx.Response) -> dict[str, Any]:
    """The part of an answer that is recorded."""
    headers = {
        name: PRESENT if name in VARYING else value
        for name, value in sorted(answer.headers.items())
        if name in HEADERS
    }
    return {
        "status": answer.status_code,
        "type": answer.headers.get("content-type", ""),
        "headers": headers,
        "sha256": hashlib.sha256(answer.content).hexdigest(),
        "body": outline(answer),
    }


def outline(answer: httpx.Response) -> Any:
    """The body, with long arrays and pictures by their shapes and means."""
    kind = answer.headers.get("content-type", "")
    if kind == "application/json":
        return _short(answer.json())
    if kind == "image/png":
        return _picture(answer.content)
    if kind == "application/x-npy":
        return _array(np.load(io.BytesIO(answer.content)))
    if kind == "application/x-npz":
        with np.load(io.BytesIO(answer.content)) as arrays:
            return {name: _array(arrays[name]) for name in arrays.files}
    return answer.text


def _array(array: np.ndarray) -> dict[str, Any]:
    return {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "mean": float(array.mean(dtype=np.float64)),
    }


def _picture(data: bytes) -> dict[str, Any]:
    image = Image.open(io.BytesIO(data))
    return {"text": getattr(image, "text", {}), **_array(np.asarray(image))}


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    if isinstance(value, str) and value.startswith("iVBORw0KGgo"):  # a PNG in base64
        return _picture(base64.b64decode(value))
    if isinstance(value, list):
        try:
            array = np.asarray(value, float)
        except (ValueError, TypeError):
            return [_short(item) for item in value]
        return _array(array) if array.size > LONG_LIST else value
    return value


def assert_close(found: Any, expected: Any, where: str) -> None:
    """Equal except for rounding."""
    if isinstance(expected, dict) and isinstance(found, dict):
        assert list(found) == list(expected), where
        for name, value in expected.items():
            assert_close(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list) and isinstance(found, list):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_close(a, b, f"{where}[{i}]")
    elif isinstance(expected, float):
        tolerance = P_VALUE_TOLERANCE if where.endswith("p_value") else TOLERANCE
        assert math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance), (
            f"{where}: {found}, not {expected}"
        )
    else:
        assert found == expected, where


def compare(answer: httpx.Response, expected: dict[str, Any], exact: bool) -> None:
    found = observed(answer)
    headers = {
        name: value
        for name, value in expected["headers"].items()
        if exact or name not in ENVIRONMENT_HEADERS
    }
    assert (found["status"], found["type"]) == (expected["status"], expected["type"]), answer.text[
        :500
    ]
    assert {name: found["headers"].get(name) for name in headers} == headers
    if "x-ade-backend" in expected["headers"]:
        assert found["headers"]["x-ade-backend"].startswith("onnxruntime/")
    assert_close(
        found["body"], expected["body"], "body"
    )  # first, because its error is the clearest
    if exact:
        assert found["sha256"] == expected["sha256"]


@pytest.fixture(scope="module")
def record() -> Iterator[dict[str, Any]]:
    yield json.loads(RECORD.read_text())


def engine_parameter(name: str) -> Any:
    """Ray takes a minute to start, and many cores to be quick."""
    if name != "ray":
        return name
    is_absent = importlib.util.find_spec("ray") is None
    reason = "ray is not installed (extra ray)"
    skips = pytest.mark.skipif(is_absent, reason=reason)
    return pytest.param(name, marks=[pytest.mark.slow, skips])


@pytest.fixture(scope="module", params=[engine_parameter(name) for name in ENGINES])
def served(request: pytest.FixtureRequest) -> Iterator[RunningService]:
    """The bundle that ships, on each engine."""
    if request.param == DEFAULT:
        yield request.getfixturevalue("service")
        return
    few = ("--workers", "1") if request.param == "ray" else ()
    running = RunningService(PRETRAINED, options=("--engine", request.param, *few), timeout=300)
    yield running
    assert running.stop() == []


def test_the_record_has_every_request(record: dict[str, Any]) -> None:
    assert list(record["answers"]) == list(REQUESTS) and list(record["servers_own"]) == list(
        SERVERS_OWN
    )


@pytest.mark.parametrize("name", REQUESTS)
def test_an_answer_is_as_recorded(
    served: RunningService, record: dict[str, Any], name: str
) -> None:
    answer = REQUESTS[name].send(served.url)
    compare(answer, record["answers"][name], record["environment"] == environment())
    body = observed(answer)["sha256"]
    assert FIRST.setdefault(name, body) == body, "the engine before gave other bytes"


@pytest.mark.parametrize("name", SERVERS_OWN)
def test_an_answer_of_the_server_itself(
    served: RunningService, record: dict[str, Any], name: str
) -> None:
    """As recorded, but for the message: engines have different paths."""
    answer, expected = SERVERS_OWN[name].send(served.url), record["servers_own"][name]
    assert answer.status_code == expected["status"]
    assert answer.json()["error"]["code"] == expected["body"]["error"]["code"]
    assert answer.json()["error"]["message"]


def test_a_changed_answer_is_noticed(record: dict[str, Any]) -> None:
    expected = record["answers"]["score: file"]
    body = json.loads(json.dumps(expected["body"]))
    body["results"][0]["bpd"] += 3 * TOLERANCE * body["results"][0]["bpd"]
    with pytest.raises(AssertionError, match=r"body.results\[0\].bpd"):
        assert_close(body, expected["body"], "body")


def write_record(url: str) -> None:
    """Send all requests and write their answers, one line each."""
    lines = {
        section: [
            f"{json.dumps(name)}: {json.dumps(observed(request.send(url)), separators=(',', ':'))}"
            for name, request in made.items()
        ]
        for section, made in (("answers", REQUESTS), ("servers_own", SERVERS_OWN))
    }
    sections = [f'"{section}": {{\n' + ",\n".join(rows) + "\n}" for section, rows in lines.items()]
    RECORD.write_text(
        "{\n" + ",\n".join([f'"environment": {json.dumps(environment())}', *sections]) + "\n}\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Record the answers of the service in this work tree."
    )
    parser.add_argument("--record", action="store_true", required=True)
    parser.parse_args()
    running = RunningService(PRETRAINED)
    try:
        write_record(running.url)
    finally:
        running.stop()
    print(f"{RECORD.relative_to(ROOT)}: {len(REQUESTS)} answers, {RECORD.stat().st_size} bytes")
