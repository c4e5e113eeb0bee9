"""The OpenAPI document describes the service: names by hand, answers by schemathesis."""

from __future__ import annotations

import json

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving.api.openapi import IMAGE_TYPES, openapi_document
from serving.api.parameters import PARAMETERS
from serving.engine.bundle import Bundle, open_bundle
from serving.images import write_png
from tests.conftest import PRETRAINED, ROOT
from tests.service import RunningService
from tests.test_images import encode
from tests.test_requests import npy

EXAMPLES = 40


def pixels(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 256, (32, 32, 3), np.uint8)
        if seed % 2
        else np.full((32, 32, 3), seed % 256, np.uint8)
    )


def files(kind: str) -> st.SearchStrategy[bytes]:
    """Good files of a type, and bytes that are none."""
    from PIL import Image

    suffix = kind.removeprefix("image/").upper()
    good = st.integers(0, 999).map(lambda seed: encode(Image.fromarray(pixels(seed)), suffix))
    return st.one_of(good, st.binary(max_size=200))


for media_type in IMAGE_TYPES:
    schemathesis.openapi.media_type(media_type, files(media_type))
schemathesis.openapi.media_type(
    "application/x-npy",
    st.one_of(
        st.integers(0, 99).map(lambda seed: npy(pixels(seed)[None].repeat(1 + seed % 3, 0))),
        st.binary(max_size=300),
    ),
)
# A base64 string of the schema is an image more often than not: random text never gets past the
# first check.
schemathesis.openapi.format("binary", files("image/png"))


@pytest.fixture(scope="module")
def document(service: RunningService) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_dict(httpx.get(f"{service.page}/openapi.json").json())


def test_the_document_names_every_operation_and_parameter() -> None:
    bundle = open_bundle(PRETRAINED)
    made = openapi_document("http://127.0.0.1:8080", [bundle], needs_token=False)
    json.dumps(made, allow_nan=False)
    assert made["openapi"] == "3.1.0" and "security" not in made
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
        assert {"200", "400", "413", "415", "422", "503"} == set(post["responses"])
    assert openapi_document("http://x", [bundle], needs_token=True)["security"] == [{"token": []}]


def test_a_model_that_can_only_sample() -> None:
    bundle = open_bundle(PRETRAINED)
    gan = Bundle(bundle.folder, {**bundle.manifest, "operations": ["sample"]})
    paths = openapi_document("http://x", [gan], needs_token=False)["paths"]
    assert "200" not in paths["/predictions/score"]["post"]["responses"]
    body = paths["/predictions/sample"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["properties"]["kind"]["enum"] == ["mean"]


def test_further_bundles_have_names_of_their_own() -> None:
    bundle = open_bundle(PRETRAINED)
    paths = openapi_document("http://x", [bundle, bundle], needs_token=False)["paths"]
    assert len(paths) == 8 and f"/predictions/{bundle.name}-score" in paths


@pytest.mark.slow
@pytest.mark.parametrize("operation", PARAMETERS)
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_answers_are_as_the_document_says(
    operation: str,
    mode: schemathesis.GenerationMode,
    service: RunningService,
    document: schemathesis.BaseSchema,
) -> None:
    """Whatever fits the schema, and whatever does not."""

    @settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(document[f"/predictions/{operation}"]["POST"].as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        answer = case.call(base_url=service.url, timeout=120)
        statuses.add(answer.status_code)
        if answer.status_code == 500 and answer.json().get("type") == "ErrorDataDecoderException":
            return  # TorchServe's own answer to a form that it cannot parse: no handler sees it
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
    assert statuses & {200, 400, 415, 422}


@pytest.mark.slow
def test_a_good_answer_of_each_operation_is_as_the_document_says(
    service: RunningService, document: schemathesis.BaseSchema
) -> None:
    """Fuzzing seldom makes a request that is answered: these are, in every format, with everything
    in them.
    """
    import base64

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
