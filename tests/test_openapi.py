"""The OpenAPI document matches the service; answers are checked by schemathesis."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ade_base.pictures.show import write_png
from serving.api.openapi import openapi_document
from serving.api.operations.base import IMAGE_TYPES
from serving.api.operations.registry import OPERATIONS
from serving.engine.bundle import Bundle, open_bundle
from tests.helpers import DATA, HAS_HEIF, PRETRAINED, ROOT, encode, npm_install, npy

EXAMPLES = 20
BINARY_BODIES = (*IMAGE_TYPES, "application/x-npy")


def pixels(seed):
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 256, (32, 32, 3), np.uint8)
        if seed % 2
        else np.full((32, 32, 3), seed % 256, np.uint8)
    )


def files(kind):
    """Valid files of a type, and random bytes."""
    name = kind.removeprefix("image/").upper().replace("HEIC", "HEIF")  # Pillow's name of both
    junk = st.binary(max_size=200)
    if name == "HEIF" and not HAS_HEIF:
        return junk
    return (
        st.sampled_from([encode(Image.fromarray(pixels(seed)), name) for seed in range(20)]) | junk
    )


for media_type in IMAGE_TYPES:
    schemathesis.openapi.media_type(media_type, files(media_type))
schemathesis.openapi.media_type(
    "application/x-npy",
    st.one_of(
        st.integers(0, 99).map(lambda seed: npy(pixels(seed)[None].repeat(1 + seed % 3, 0))),
        st.binary(max_size=300),
    ),
)
# Most strings of format base64 are images here: random text would fail the first check.
schemathesis.openapi.format("binary", files("image/png"))


@pytest.fixture(scope="module")
def document(service):
    return schemathesis.openapi.from_dict(httpx.get(f"{service.page}/openapi.json").json())


def test_the_document_names_every_operation_and_parameter():
    bundle = open_bundle(PRETRAINED)
    made = openapi_document("http://127.0.0.1:8080", [bundle], needs_token=False)
    json.dumps(made, allow_nan=False)
    assert made["openapi"] == "3.1.0" and made["security"] == []
    names = {
        "sample": {"n", "seed", "index", "temperature", "kind", "latents", "format"},
        "encode": {"images", "seed", "resize", "eps", "format"},
        "reconstruct": {"images", "seed", "resize", "kind", "format"},
        "score": {
            "images",
            "seed",
            "resize",
            "samples",
            "alpha",
            "fdr",
            "explain",
            "map",
            "calibration",
            "format",
        },
    }
    text = (ROOT / "docs" / "api.md").read_text()
    for operation, expected in names.items():
        post = made["paths"][f"/predictions/{operation}"]["post"]
        assert (
            set(post["requestBody"]["content"]["application/json"]["schema"]["properties"])
            == expected
        )
        assert all(f"`{name}`" in text or f'"{name}"' in text for name in expected)
        # 501 answers methods that no operation has, and 429 is a proxy's.
        documented = set(re.findall(r"^\| (\d{3}) \|", text, re.MULTILINE)) - {"501"}
        assert set(post["responses"]) == documented | {"200", "429"}
    assert openapi_document("http://x", [bundle], needs_token=True)["security"] == [{"token": []}]


def parts(value):
    """Every object in a document."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            yield from parts(item)


def test_what_generators_of_clients_need():
    made = openapi_document("http://x", [open_bundle(PRETRAINED)], needs_token=False)
    for part in parts(made):
        assert part.get("type") != "array" or "items" in part, part
        # Go and Java take integers without a format for 32 bits, which many seeds exceed.
        if part.get("type") == "integer" and part.get("maximum", 2**63) >= 2**31:
            assert part.get("format") == "int64", part
        if "$ref" in part:
            assert part["$ref"].rsplit("/", 1)[1] in made["components"]["schemas"]
    posts = {name: made["paths"][f"/predictions/{name}"]["post"] for name in OPERATIONS}
    answers = {name: post["responses"]["200"] for name, post in posts.items()}
    # Binary answers and JSON are separate media types, JSON with a model.
    assert {name: list(answer["content"]) for name, answer in answers.items()} == {
        "sample": ["image/png", "application/x-npy", "application/json"],
        "encode": ["application/json", "application/x-npz"],
        "reconstruct": ["image/png", "application/x-npy", "application/json"],
        "score": ["application/json", "image/png"],
    }
    for name, answer in answers.items():
        for media_type, content in answer["content"].items():
            is_json = media_type == "application/json"
            model = f"#/components/schemas/{name.capitalize()}Answer"
            assert content["schema"] == (
                {"$ref": model} if is_json else {"type": "string", "format": "binary"}
            )
    # A client that sends defaults would send n together with latents, which is an error.
    fields = posts["sample"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert [name for name, field in fields.items() if "default" in field] == ["kind", "format"]
    assert "X-Ade-Seed" in answers["sample"]["headers"]
    assert "X-Ade-Psnr" in answers["reconstruct"]["headers"]
    for status, header in {
        "401": "WWW-Authenticate",
        "405": "Allow",
        "429": "Retry-After",
        "503": "Retry-After",
    }.items():
        assert header in posts["score"]["responses"][status]["headers"]
    form = posts["score"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    (pattern,) = form["patternProperties"]
    assert re.match(pattern, "image12") and not re.match(pattern, "images")


def test_a_model_that_can_only_sample():
    bundle = open_bundle(PRETRAINED)
    gan = Bundle(bundle.folder, {**bundle.manifest, "operations": ["sample"]})
    made = openapi_document("http://x", [gan], needs_token=False)
    paths = made["paths"]
    assert "200" not in paths["/predictions/score"]["post"]["responses"]
    assert "ScoreAnswer" not in made["components"]["schemas"]
    body = paths["/predictions/sample"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["properties"]["kind"]["enum"] == ["mean"]


def test_further_bundles_have_names_of_their_own():
    bundle = open_bundle(PRETRAINED)
    paths = openapi_document("http://x", [bundle, bundle], needs_token=False)["paths"]
    assert len(paths) == 8 and f"/predictions/{bundle.name}-score" in paths


def test_bundles_of_other_shapes_have_models_of_their_own():
    bundle = open_bundle(PRETRAINED)
    shallow = {"name": "shallow", "latent_shapes": bundle.manifest["latent_shapes"][:1]}
    other = Bundle(bundle.folder, bundle.manifest | shallow)
    schemas = openapi_document("http://x", [bundle, other], False)["components"]["schemas"]
    assert schemas["EncodeResult"]["properties"]["levels"]["minItems"] == 3
    assert schemas["shallow-EncodeResult"]["properties"]["levels"]["minItems"] == 1
    assert "kl_1" not in schemas["shallow-ScoreResult"]["properties"]["bpd_parts"]["properties"]
    assert "shallow-Map" not in schemas and "shallow-Problem" not in schemas


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_answers_are_as_the_document_says(operation, mode, service, document):
    """Requests are generated by the schema, and against it."""

    @settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(document[f"/predictions/{operation}"]["POST"].as_strategy(generation_mode=mode))
    def check(case):
        case.headers.pop("X-Ade-Model", None)  # no other answer than 412 would be seen
        answer = case.call(base_url=service.url, timeout=120)
        statuses.add(answer.status_code)
        case.validate_response(
            answer,
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ],
        )

    statuses: set[int] = set()
    check()
    # The others need an image, which is rarely generated: see the next test.
    is_valid = operation == "sample" and mode is schemathesis.GenerationMode.POSITIVE
    assert statuses & ({200} if is_valid else {400, 415, 422})


@pytest.mark.slow
def test_a_good_answer_of_each_operation_is_as_the_document_says(service, document):
    """Fuzzing rarely makes valid requests, so these have every format and every field."""
    image = base64.b64encode(write_png(pixels(4))).decode()
    for operation, bodies in {
        "sample": [{"format": "json", "n": 2}, {"format": "npy"}, {}],
        "encode": [{"images": [image]}, {"images": [image], "format": "npz"}],
        "reconstruct": [
            {"images": [image, "junk"]},
            {"images": [image]},
            {"images": [image], "format": "npy"},
        ],
        "score": [
            {"images": [image, image, "junk"], "fdr": 0.1, "map": True, "samples": 3},
            {"images": [image], "explain": False},
        ],
    }.items():
        for body in bodies:
            answer = httpx.post(f"{service.url}/predictions/{operation}", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            document[f"/predictions/{operation}"]["POST"].validate_response(answer)


@pytest.mark.slow
def test_a_generated_client_calls_all_operations(service, tmp_path, monkeypatch):
    """That of openapi-python-client, which reads JSON answers and sends JSON and forms."""
    if importlib.util.find_spec("openapi_python_client") is None:
        pytest.skip("openapi-python-client is not installed (pip install openapi-python-client)")
    (tmp_path / "openapi.json").write_text(httpx.get(f"{service.page}/openapi.json").text)
    (tmp_path / "config.yaml").write_text("post_hooks: []\n")
    made = subprocess.run(
        [
            *(sys.executable, "-m", "openapi_python_client", "generate"),
            *("--path", "openapi.json", "--config", "config.yaml"),
            *("--meta", "none", "--output-path", "generated"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    # It cannot send a file as the body. Nothing else is left out.
    warnings = re.findall(r"^(?:Unsupported|Cannot|Invalid|ERROR).*", made.stdout, re.MULTILINE)
    assert set(warnings) <= {f"Unsupported content type {one}" for one in BINARY_BODIES}, warnings
    # Version 0.29 forgets an import where an operation takes several types of bodies.
    for module in (tmp_path / "generated" / "api" / "default").glob("*.py"):
        text = module.read_text()
        module.write_text(
            text.replace("import Response, UNSET\n", "import Response, UNSET, Unset\n")
        )
    monkeypatch.syspath_prepend(tmp_path)
    client = importlib.import_module("generated").Client(service.url)
    models = importlib.import_module("generated.models")

    def call(operation, kind, **fields):
        body = getattr(models, f"{operation.capitalize()}{kind}Body")(**fields)
        module = importlib.import_module(f"generated.api.default.{operation}")
        answer = module.sync_detailed(client=client, body=body)
        assert answer.status_code == 200, answer.content
        assert answer.headers["X-Ade-Model"]
        return answer.parsed

    picture = write_png(pixels(4))
    image = base64.b64encode(picture).decode()
    drawn = call("sample", "Json", n=2, seed=7, format_=models.SampleJsonBodyFormat.JSON)
    assert drawn.seed == 7 and len(drawn.results) == 2
    encoded = call("encode", "Json", images=[image])
    assert len(encoded.results[0].levels) == 3
    rebuilt = call(
        "reconstruct", "Json", images=[image], format_=models.ReconstructJsonBodyFormat.JSON
    )
    assert base64.b64decode(rebuilt.results[0].image).startswith(b"\x89PNG")
    scored = call("score", "Json", images=[image, "junk"], map_=True)
    result, problem = scored.results
    assert isinstance(result, models.ScoreResult) and isinstance(problem, models.Problem)
    assert problem.error.code == "not_an_image" and result.map_.bits
    file = importlib.import_module("generated.types").File(io.BytesIO(picture), "image.png")
    (alike,) = call("score", "Files", image=file).results
    assert alike.bpd == result.bpd
    refused = importlib.import_module("generated.api.default.score").sync(
        client=client, body=models.ScoreJsonBody(images=["junk"])
    )
    assert isinstance(refused, models.Problem) and refused.error.code == "not_an_image"


@pytest.mark.slow
def test_a_typescript_client_calls_all_operations(service, tmp_path):
    """That of openapi-fetch, whose types openapi-typescript makes; `data/client.mts` is strict."""
    tools = npm_install(tmp_path, "openapi-fetch@0.17", "openapi-typescript@7", "typescript@5")
    (tmp_path / "openapi.json").write_text(httpx.get(f"{service.page}/openapi.json").text)
    shutil.copy(DATA / "client.mts", tmp_path)
    image = base64.b64encode(write_png(pixels(4))).decode()
    target = ["--strict", "--skipLibCheck", "--target", "es2022", "--module", "nodenext"]
    for command in (
        [tools / "openapi-typescript", "openapi.json", "--output", "api.d.ts"],
        [tools / "tsc", *target, "client.mts"],
        ["node", "client.mjs", service.url, image],
    ):
        done = run(command, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() in ("accept", "reject")


@pytest.mark.slow
def test_linters_find_no_error(tmp_path):
    tools = npm_install(tmp_path, "@redocly/cli@2", "@stoplight/spectral-cli@6")
    (tmp_path / ".spectral.yaml").write_text("extends: [spectral:oas]")
    for needs_token in (False, True):
        made = openapi_document("http://x", [open_bundle(PRETRAINED)], needs_token)
        (tmp_path / "openapi.json").write_text(json.dumps(made))
        for tool in ("redocly", "spectral"):
            done = run([tools / tool, "lint", "openapi.json"], tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr


def run(command, folder):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
