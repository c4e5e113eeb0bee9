"""The requests of the recorded contract, see test_contract.py."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from serving.engine.bundle import open_bundle
from tests.helpers import PRETRAINED, ROOT, b64, npy, png_header

EXAMPLES = ROOT / "serving" / "examples"


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

    def send(self, client):
        options: dict[str, Any] = {"data": self.fields or None}
        if self.files:
            options["files"] = [
                (name, ("image", data, "application/octet-stream")) for name, data in self.files
            ]
        headers = {} if self.model is None else {"X-Ade-Model": self.model}
        if self.content is not None:
            options = {"content": self.content}
            headers["Content-Type"] = self.content_type
        return client.request(
            self.method, f"/predictions/{self.operation}", headers=headers, **options
        )


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def as_json(operation, **values):
    return Request(operation, json.dumps(values).encode(), "application/json")


def as_form(operation, *files, **fields):
    names = [f"image{i or ''}" for i in range(len(files))]
    return Request(operation, fields=fields, files=tuple(zip(names, files, strict=True)))


def part(name, content, kind="application/octet-stream"):
    """One part of a form with the boundary ``x``."""
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"\r\nContent-Type: {kind}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def as_parts(body):
    return Request("score", body, "multipart/form-data; boundary=x")


def latents(**values):
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


def requests():
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


def servers_own():
    """Requests that the model server answers by itself, before any handler of ours."""
    return {
        "unknown model": Request("other", CAT, "image/png"),
        "unknown version": Request("score/9.9", CAT, "image/png"),
        "malformed form": Request("score", b"a=%zz", "application/x-www-form-urlencoded"),
    }


REQUESTS, SERVERS_OWN = requests(), servers_own()
