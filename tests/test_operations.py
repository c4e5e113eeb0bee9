"""The models of the API: from one declaration follow requests, JSON, the schema and the client."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any

import httpx
import numpy as np
import pytest

from ade_client.client import AdeClient, AdeError
from ade_client.contract import (
    MAX_IMAGES,
    GivenLatents,
    GivenLevel,
    ImageParameters,
    Kind,
    Latents,
    Map,
    Reconstruction,
    SampleParameters,
    ScoreAnswer,
    ScoreParameters,
    ScoreResult,
    Unusual,
)
from ade_client.model import Above, Between, Excludes, fields_of, from_json, to_json
from handlers.limits import MAX_REQUEST_BYTES
from serving.api.operations.registry import OPERATIONS
from serving.api.operations.score import Score
from serving.api.schema import Schemas
from serving.engine.bundle import open_bundle
from serving.ingest.errors import ApiError, problem_of
from serving.ingest.parameters import read
from serving.ingest.requests import RawRequest
from tests.helpers import PRETRAINED, b64
from tests.test_requests import png

RESULT = ScoreResult(
    bpd=3.5,
    bpd_parts={"dequantization": 8.0, "kl_0": -4.5},
    standard_error=None,
    ood_score=1.5,
    p_value=0.25,
    ood=False,
    explain=[Unusual("kl_0", 1.25, 0.5)],
    map=Map(bits=np.array([[1.0, 2.0]]), png=b"picture"),
    notes=["converted"],
    decision="accept",
    decision_reason=None,
)


@dataclass(frozen=True, kw_only=True)
class Extended(ScoreParameters):
    sharpness: Annotated[float, Above(0, 2), "a parameter that does not exist"] = 0.5


class ExtendedScore(Score):
    parameters = Extended


def test_a_new_parameter_is_one_declaration():
    bundle = open_bundle(PRETRAINED)
    operation = ExtendedScore()
    for request in (
        RawRequest("application/json", {"images": [b64(png())], "sharpness": 1.5}),
        RawRequest("multipart/form-data", None, {"image": png(), "sharpness": b"1.5"}),
    ):
        assert operation.parse(request, bundle).parameters == Extended(sharpness=1.5)
    with pytest.raises(ApiError, match="sharpness must be above 0 and at most 2, got 3"):
        operation.read({"sharpness": 3})
    schema = Schemas({}, bundle).parameters(operation.fields)["sharpness"]
    assert schema == {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": 2,
        "description": "a parameter that does not exist",
        "default": 0.5,
    }
    assert to_json(Extended(sharpness=1.5)) == {"sharpness": 1.5}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_client_takes_the_parameters_of_the_operation(name):
    operation = OPERATIONS[name]
    taken = inspect.signature(getattr(AdeClient, name)).parameters
    expected = {f.attribute: f.default for f in fields_of(operation.parameters).values()}
    first = ["self", "images"] if issubclass(operation.parameters, ImageParameters) else ["self"]
    assert list(taken) == [*first, *expected]
    assert {name: taken[name].default for name in expected} == expected
    with pytest.raises(TypeError, match="sede"):
        getattr(AdeClient("http://127.0.0.1:1"), name)(*([] for _ in first[1:]), sede=1)


def test_arguments_of_the_client_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="retries must be at least 0, got -1"):
        AdeClient(retries=-1)
    for token in ("", "secret\n", "sécret"):  # an empty variable, the line of a file
        with pytest.raises(ValueError, match="token must be printable ASCII") as refused:
            AdeClient(token=token)
        assert not token or token not in str(refused.value)
    client = AdeClient("http://127.0.0.1:1", retries=0)
    for levels, counts in (
        ([], "no level"),
        ([np.zeros((1, 2, 4, 4)), np.zeros((2, 2, 8, 8))], "1, 2"),
    ):
        for decode in (client.decode, client.sample_with):
            with pytest.raises(ValueError, match=f"as many images, got {counts}"):
                decode(levels)
    with pytest.raises(TypeError, match="resize must be true or false, got 'no'"):
        client.score(np.zeros((8, 8, 3), np.uint8), resize="no")
    written = to_json(ScoreParameters(alpha=np.float32(0.5), samples=np.int64(2)))
    assert json.loads(json.dumps(written)) == {"alpha": 0.5, "samples": 2}


@pytest.mark.parametrize("name", OPERATIONS)
def test_parameters_are_read_as_they_were_written(name):
    operation = OPERATIONS[name]
    others = {"kind": "density", "eps": True, "map": True, "resize": True, "fdr": 0.2, "n": 3}
    known = {f.name for f in dataclasses.fields(operation.parameters)}
    changed = {name: value for name, value in others.items() if name in known}
    for parameters in (operation.parameters(), operation.parameters(**changed)):
        written = json.loads(json.dumps(to_json(parameters)))
        assert operation.read(written)[0] == parameters
    assert to_json(operation.parameters()) == {}


def test_a_result_is_read_as_it_was_written():
    answer = ScoreAnswer(
        model="m",
        estimator="elbo",
        samples=1,
        alpha=0.01,
        results=[RESULT, problem_of(ApiError(415, "not_an_image", "text", 1))],
    )
    written = json.loads(json.dumps(to_json(answer)))
    assert list(written) == ["model", "estimator", "samples", "alpha", "results"]
    assert written["results"][1] == ApiError(415, "not_an_image", "text", 1).body()
    entry = written["results"][0]
    assert "discovery" not in entry and entry["standard_error"] is None
    assert entry["map"] == {"bits": [[1.0, 2.0]], "png": "cGljdHVyZQ=="}
    result, problem = from_json(ScoreAnswer, {**written, "of a newer version": 1}).results
    assert isinstance(result, ScoreResult) and problem == answer.results[1]
    assert result.bits is not None and np.array_equal(result.bits, [[1, 2]])
    assert result.heat_map == b"picture" and result.accepted
    assert dataclasses.replace(result, map=None) == dataclasses.replace(RESULT, map=None)
    assert to_json(RESULT, always=("discovery",))["discovery"] is None


def test_an_infinite_psnr_is_null():
    made = Reconstruction(png=b"x", psnr=math.inf)
    assert to_json(made) == {"image": "eA==", "psnr": None}
    assert from_json(Reconstruction, to_json(made)) == made


def test_latents_of_a_request():
    levels = [GivenLevel(z=np.zeros((1, 1, 2)))]
    given = SampleParameters(latents=[GivenLatents(levels=levels)], seed=3)
    assert to_json(given) == {"seed": 3, "latents": [{"levels": [{"z": [[[0.0, 0.0]]]}]}]}


def test_latents_of_an_npz_without_noise():
    arrays = [np.zeros((2, 1, 2, 2)), np.ones((2, 1, 4, 4))]
    made = Latents(arrays, arrays, arrays, []).arrays()
    assert list(made) == ["mean_0", "log_scale_0", "z_0", "mean_1", "log_scale_1", "z_1"]


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("spellings", ["false true", "False True", "FALSE TRUE", "off on", "0 1"])
def test_forms_may_spell_booleans_as_usual(value, spellings):
    @dataclass(frozen=True)
    class Options:
        d: bool = False

    assert read("x", fields_of(Options), {"d": spellings.split()[value]}) == {"d": value}
    for wrong in ("yes", "", "tru", 1, 0.0, [True]):
        with pytest.raises(ApiError, match="d must be true or false, got"):
            read("x", fields_of(Options), {"d": wrong})


def test_a_kind_of_parameter_for_each_type():
    @dataclass(frozen=True)
    class Every:
        a: Annotated[int, Between(0, 5), Excludes("b", "of two")] = 1
        b: Annotated[float | None, Above(0, 5)] = None
        c: Kind = "mean"
        d: bool = False

    fields = fields_of(Every)
    assert read("x", fields, {"b": "2.5", "c": None, "d": "true"}) == {
        "a": 1,
        "b": 2.5,
        "c": "mean",
        "d": True,
    }
    with pytest.raises(ApiError, match="a and b exclude each other: of two"):
        read("x", fields, {"a": 1, "b": 2})


def test_latents_of_as_many_images_as_allowed_fit_into_a_request(monkeypatch):
    rng = np.random.default_rng(0)
    z = [
        rng.standard_normal((MAX_IMAGES // 16, *shape), np.float32)
        for shape in open_bundle(PRETRAINED).manifest["latent_shapes"]
    ]
    z[0].flat[:5] = [0, -1e-30, 1e-45, 123456.789, 3.4e38]
    sent: list[dict[str, Any]] = []

    def send(self, operation, values):
        sent.append(values)
        return httpx.Response(400)

    monkeypatch.setattr(AdeClient, "_send", send)
    with AdeClient() as client, pytest.raises(AdeError):
        client.decode(z)
    text = json.dumps(sent[0], separators=(",", ":"))
    assert 16 * len(text) < MAX_REQUEST_BYTES
    for level, expected in enumerate(z):
        found = [image["levels"][level]["z"] for image in json.loads(text)["latents"]]
        assert np.array_equal(np.array(found, np.float32), expected)
