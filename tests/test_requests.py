"""Parsing requests: accepted forms, and the status and message of every error."""

import io
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ade_client.contract import ScoreParameters
from serving.api.operations.registry import OPERATIONS
from serving.api.operations.sample import Sample
from serving.api.responses import error_response
from serving.engine.bundle import Bundle
from serving.ingest.errors import ApiError
from serving.ingest.picture import Picture
from serving.ingest.requests import ImagesRequest, RawRequest, array_of, decode_images
from tests.helpers import b64, npy

SHAPE = (8, 8, 3)
LATENTS = [(3, 2, 2), (2, 4, 4)]
BUNDLE = Bundle(Path(), {"name": "b", "image_shape": SHAPE, "latent_shapes": LATENTS})
PIXELS = (np.arange(192) % 251).astype(np.uint8).reshape(SHAPE)


def png(pixels=PIXELS):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def as_json(**values):
    return RawRequest("application/json", values)


def body(data, content_type="application/octet-stream"):
    return RawRequest(content_type, bytearray(data))


def form(**fields):
    return RawRequest("multipart/form-data; boundary=x", None, fields)


def refused(call, *args):
    with pytest.raises(ApiError) as caught:
        call(*args)
    return caught.value


def parse_sample(request, latent_shapes):
    return Sample().parse(request, Bundle(Path(), {"latent_shapes": latent_shapes}))


def parse_images(operation, request):
    return OPERATIONS[operation].parse(request, BUNDLE)


def read_images(operation, request, shape):
    return decode_images([parse_images(operation, request)], shape)[0]


@pytest.mark.parametrize(
    "request_",
    [
        body(png()),
        body(png(), "image/png"),
        body(npy(PIXELS[None]), "application/x-npy"),
        as_json(images=[b64(png())]),
        as_json(images=["data:image/png;base64," + b64(png())]),
        form(image=png()),
        form(image=bytearray(npy(PIXELS[None]))),
        RawRequest("application/json", json.dumps({"images": [b64(png())]}).encode()),
        body(npy(np.asfortranarray(PIXELS[None]))),
    ],
    ids=[
        "file",
        "typed file",
        "npy",
        "json",
        "data url",
        "form",
        "npy in a form",
        "json as bytes",
        "npy by columns",
    ],
)
def test_every_way_to_send_an_image(request_):
    parsed = read_images("score", request_, SHAPE)
    (image,) = parsed.images
    assert isinstance(image, Picture) and np.array_equal(image.pixels, PIXELS)
    assert parsed.parameters == ScoreParameters(
        seed=0,
        resize=False,
        samples=1,
        alpha=0.01,
        fdr=None,
        explain=True,
        map=False,
        calibration="default",
    )
    assert parsed.format == "json"


def test_images_of_a_form_come_in_the_order_of_their_numbers():
    fields = {f"image{i}": png(np.full(SHAPE, i, np.uint8)) for i in (10, 2, 1)} | {"image": png()}
    parsed = read_images("score", form(**fields, samples=b"2", alpha="0.5"), SHAPE)
    assert [int(i.pixels[0, 0, 0]) for i in parsed.images[1:]] == [1, 2, 10]
    assert parsed.parameters.samples == 2 and parsed.parameters.alpha == 0.5


# Besides those of the recorded contract (contract.py), which have their messages there.
BAD_IMAGE_REQUESTS = {
    "float array": (
        body(npy(np.zeros((1, 8, 8, 3), np.float32))),
        422,
        "must be uint8, got float32",
    ),
    "no images in the array": (body(npy(np.zeros((0, 8, 8, 3), np.uint8))), 400, "holds no image"),
    "cut header": (body(b"\x93NUMPY\x01\x00\x76\x00{'descr'"), 400, r"\.npy file is damaged"),
    "open bracket": (
        body(npy(PIXELS[None]).replace(b"(1, 8, 8, 3)", b"(1, 8, 8, 3 ")),
        400,
        r"\.npy file is damaged",
    ),
    "call in the header": (
        body(npy(PIXELS[None]).replace(b"'|u1'", b"f(1) ")),
        400,
        r"\.npy file is damaged",
    ),
    "unknown version": (
        body(npy(PIXELS[None]).replace(b"NUMPY\x01", b"NUMPY\x09")),
        400,
        r"\.npy file is damaged",
    ),
    "seed of text": (form(image=png(), seed="x"), 422, "seed must be a whole number"),
    "a field's number of many digits": (
        form(**{"image": png(), "image" + "1" * 5000: png()}),
        400,
        "must be text; image files go into fields named",
    ),
    "binary field": (
        form(image=png(), seed=b"\xff\xfe"),
        400,
        "must be text; image files go into fields named",
    ),
    "negative shape": (
        body(npy(PIXELS[None]).replace(b"(1, 8, 8, 3)", b"(-1,-8,8,3) ")),
        400,
        "damaged: shape",
    ),
    "a field that the server parsed": (
        form(image=png(), x=20_000_000_000),
        400,
        "must be text or a file, got int",
    ),
}


@pytest.mark.parametrize("name", BAD_IMAGE_REQUESTS)
def test_bad_requests(name):
    request_, status, message = BAD_IMAGE_REQUESTS[name]
    with pytest.raises(ApiError, match=message) as caught:
        read_images("score", request_, SHAPE)
    # The address of an object.
    assert caught.value.status == status and "0x" not in caught.value.message


# Besides those of the recorded contract.
BAD_PARAMETERS = [
    ({"n": 10**400}, "an integer of 1329 bits"),
    ({"n": 1.5}, "n must be a whole number"),
    ({"n": True}, "n must be a whole number"),
    ({"n": "x"}, "n must be a whole number"),
    ({"n": [1]}, "n must be a whole number"),
    ({"seed": 2**63}, "seed must be from 0"),
    ({"temperature": float("nan")}, "temperature must be above 0"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": "hot"}, "temperature must be a number"),
    ({"temperature": "0_0.5"}, "temperature must be a number"),
    ({"temperature": "٠.٥"}, "temperature must be a number"),
    ({"temperature": 10**400}, "temperature must be above 0"),
    ({"kind": ["mean"]}, "kind must be one of"),
    (
        {"latents": [{"levels": [{"z": [1]}, {"z": [2]}]}]},
        r"z of level 0 must have shape \(3, 2, 2\)",
    ),
    ({"latents": [{"levels": [{"z": "a"}, {"z": [2]}]}]}, "z of level 0 must be numbers"),
    *(
        (
            {"latents": [{"levels": [{"z": np.full((3, 2, 2), one).tolist()}, {"z": [2]}]}]},
            "z of level 0 must be numbers",
        )
        for one in ("1.5", True)
    ),
    (
        {"latents": [{"levels": [{"eps": [1]}, {"eps": [2]}]}]},
        r"eps of level 0 must have shape \(3, 2, 2\)",
    ),
    ({"latents": [{"levels": [{"eps": None}, {"eps": [2]}]}]}, "eps of level 0 must"),
    ({"latents": [{"levels": [{}, {"eps": [2]}]}]}, "or eps in all"),
    ({"latents": [{"levels": 3}]}, "must have 2 levels per image"),
    ({"latents": [3]}, "must have 2 levels per image"),
    (
        {
            "latents": [
                {
                    "levels": [
                        {"eps": np.zeros((3, 2, 2)).tolist()},
                        {"z": np.zeros((2, 4, 4)).tolist()},
                    ]
                }
            ]
        },
        "z in all levels of all images, or eps in all",
    ),
]


def test_a_colour_picture_becomes_grey_for_a_grey_model():
    (grey,) = read_images("score", body(png()), (8, 8, 1)).images
    assert isinstance(grey, Picture) and grey.pixels.shape == (8, 8, 1)


@pytest.mark.parametrize("values, message", BAD_PARAMETERS)
def test_bad_parameters(values, message):
    with pytest.raises(ApiError, match=message) as caught:
        parse_sample(as_json(**values), LATENTS)
    assert caught.value.status == 422 and len(caught.value.message) < 250


def test_sample_defaults_and_forms():
    assert parse_sample(as_json(), LATENTS) == parse_sample(
        RawRequest("application/json", b"{}"), LATENTS
    )
    parsed = parse_sample(
        form(n=b"3", seed="5", temperature="0.5", kind="density", format="npy"), LATENTS
    )
    given = parsed.parameters
    assert (given.n, given.seed, given.temperature, given.kind) == (3, 5, 0.5, "density")
    assert parsed.format == "npy"
    assert refused(parse_sample, body(b""), LATENTS).status == 400
    assert "as JSON" in refused(parse_sample, body(b"n=3", "text/plain"), LATENTS).message


def test_json_that_came_as_a_form():
    """curl sends ``-d '{...}'`` as a form, and the server finds no field in it."""
    with pytest.raises(ApiError, match="needs the header Content-Type: application/json"):
        parse_sample(RawRequest("application/x-www-form-urlencoded", None, {}), LATENTS)
    assert (
        parse_sample(
            RawRequest("application/x-www-form-urlencoded", None, {"n": b"4"}), LATENTS
        ).count
        == 4
    )


def test_noise_may_be_larger_than_latents():
    def levels(name):
        return [{name: np.full(shape, 5000.0).tolist()} for shape in LATENTS]

    assert parse_sample(as_json(latents=[{"levels": levels("eps")}]), LATENTS).latents_are == "eps"
    with pytest.raises(ApiError, match="z of level 0 must be finite numbers of at most 1000"):
        parse_sample(as_json(latents=[{"levels": levels("z")}]), LATENTS)
    both = [{**z, "eps": eps["eps"]} for z, eps in zip(levels("z"), levels("eps"), strict=True)]
    only_eps_in_all = [both[0], {"eps": both[1]["eps"]}]
    assert (
        parse_sample(as_json(latents=[{"levels": only_eps_in_all}]), LATENTS).latents_are == "eps"
    )


def test_latents_in_the_structure_of_encode():
    levels = [
        {"shape": list(s), "mean": 0, "log_scale": 0, "z": np.ones(s).tolist()} for s in LATENTS
    ]
    for latents in (
        [{"levels": levels}],
        {"levels": levels},
        {"model": "m", "results": [{"levels": levels}]},
    ):
        parsed = parse_sample(as_json(latents=latents), LATENTS)
        assert parsed.count == 1 and parsed.latents is not None
        assert parsed.latents[1].shape == (1, 2, 4, 4)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=12,
)
NAMES = sorted({name for known in OPERATIONS.values() for name in known.fields} | {"images"})


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(OPERATIONS)),
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), JSON_VALUES, max_size=5),
)
def test_any_json_is_parsed_or_refused_in_shape(operation, values):
    check(operation, RawRequest("application/json", values))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(OPERATIONS)),
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"{"]),
    st.sampled_from(["", "application/json", "application/x-npy", "image/png", "text/plain"]),
)
def test_any_bytes_are_parsed_or_refused_in_shape(operation, data, start, content_type):
    check(operation, RawRequest(content_type, bytearray(start + data)))


def check(operation, request_):
    try:
        parsed = (
            parse_sample(request_, LATENTS)
            if operation == "sample"
            else read_images(operation, request_, SHAPE)
        )
    except ApiError as error:
        assert error.status in (400, 413, 415, 422)
        assert set(error.body()["error"]) <= {"code", "message", "index"} and error.code
        assert error.message
        json.dumps(error.body())
    else:
        if isinstance(parsed, ImagesRequest):
            assert parsed.images


def test_large_pictures_are_refused_together_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr("serving.ingest.requests.MAX_REQUEST_PIXELS", 2_000)
    one = b64(png(np.zeros((40, 40, 3), np.uint8)))
    assert isinstance(
        read_images("score", as_json(images=[one], resize="fit"), SHAPE).images[0], Picture
    )
    with pytest.raises(
        ApiError, match="may have at most 2000 pixels together, these have 3200"
    ) as caught:
        read_images("score", as_json(images=[one, one], resize="fit"), SHAPE)
    assert caught.value.status == 413
    parsed = read_images("score", as_json(images=[one, one, b64(b"junk")]), SHAPE)
    assert [image.code for image in parsed.images] == ["wrong_size", "wrong_size", "not_an_image"]


def test_large_json_is_refused_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr("serving.ingest.requests.MAX_JSON_BYTES", 1000)
    with pytest.raises(
        ApiError, match="JSON may have at most 1000 bytes here, the body has 2000"
    ) as caught:
        read_images("score", RawRequest("application/json", b"[" * 2000), SHAPE)
    assert caught.value.status == 413


def test_latents_may_be_as_many_as_images(monkeypatch):
    """Longer text is not parsed, neither in a body nor in a form."""
    monkeypatch.setattr("serving.ingest.requests.MAX_JSON_BYTES", 1000)
    shapes = [(8, 8, 8)]
    number = -1.1754943508222875e-38  # as long as possible
    level = dict.fromkeys(("mean", "log_scale", "z", "eps"), np.full(shapes[0], number).tolist())
    whole = json.dumps({"latents": {"results": [{"levels": [level]}] * 256}}).encode()
    assert parse_sample(body(whole, "application/json"), shapes).count == 256
    for request in (body(b"[" * 2 * 10**7, "application/json"), form(latents=b"[" * 2 * 10**7)):
        assert refused(parse_sample, request, shapes).status == 413


def test_messages_that_are_not_utf8_are_answered():
    answer = error_response(ApiError(422, "bad_parameter", "kind is '\ud800'"))
    assert json.loads(answer.body)["error"]["message"] == "kind is '\ud800'"


@pytest.mark.parametrize(
    "operation, text, what",
    [
        ("score", '{"images":[' + "[]," * 8_000_000 + "[]]}", "100000 lists and objects"),
        ("encode", "[" + "{}," * 5_000_000 + "{}]", "100000 lists and objects"),
        ("reconstruct", "{" + ",".join(f'"k{i}":1' for i in range(500_000)) + "}", "100000 values"),
        ("sample", '{"latents":[' + "[]," * 300_000 + "[]]}", "123552 lists and objects"),
        ("sample", '{"latents":[' + "0," * 300_000 + "0]}", "245056 values"),
    ],
)
def test_json_of_too_many_values_is_refused_before_it_is_parsed(operation, text, what):
    """Below the limit of bytes there is room for 8 million lists: 450 MB and many seconds."""
    raw = RawRequest("application/json", text.encode())
    started = time.process_time()
    with pytest.raises(ApiError) as raised:
        parse_sample(raw, LATENTS) if operation == "sample" else parse_images(operation, raw)
    assert (raised.value.status, raised.value.code) == (413, "request_too_large")
    assert what in raised.value.message
    assert time.process_time() - started < 4


def test_booleans_among_numbers_are_no_numbers():
    levels = [{"z": np.zeros(shape).tolist()} for shape in LATENTS]
    levels[0]["z"][0][0][0] = True
    error = refused(parse_sample, as_json(latents=[{"levels": levels}]), LATENTS)
    assert error.code == "bad_latents" and "must be numbers" in error.message
    with pytest.raises(TypeError, match="a boolean among the numbers"):
        array_of([True, 7])
    assert array_of([True, False], of_booleans=True).dtype == bool


def test_whole_numbers_may_have_a_fraction_of_zero():
    """JSON has one type of numbers, and some languages write 4 as 4.0."""
    assert parse_sample(as_json(n=4.0, seed=7.0), LATENTS) == parse_sample(
        as_json(n=4, seed=7), LATENTS
    )
    for value in (1.5, 1e300, float("nan")):
        assert refused(parse_sample, as_json(n=value), LATENTS).code == "bad_parameter"


def test_values_that_json_can_just_nest_are_refused():
    """Python's limit of recursion is reached by the text of the error first."""
    for depth in range(900, 1000):
        nested = f'{{"images": ["AA=="], "seed": {"[" * depth}1{"]" * depth}}}'
        raw = RawRequest("application/json", nested.encode())
        assert refused(parse_images, "score", raw).status in (400, 422)


def test_text_among_numbers_takes_no_memory():
    """NumPy makes each value as long as the longest text: here 400 MB of 700 kB."""
    values = ["a" * 1000, *range(100_000)]
    levels = [{"z": [[values]]}, {"z": np.zeros(LATENTS[1]).tolist()}]
    raw = body(json.dumps({"latents": [{"levels": levels}]}).encode(), "application/json")
    tracemalloc.start()
    try:
        error = refused(parse_sample, raw, LATENTS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error.code == "bad_latents" and peak < 50e6


@pytest.mark.parametrize(
    "shapes", [LATENTS, [(32, 4, 4), (16, 8, 8), (8, 16, 16)], [(3, 1, 1)], [(1, 1, 512)]]
)
def test_every_answer_of_encode_can_be_sent_back(shapes):
    levels = [
        {
            "shape": shape,
            **dict.fromkeys(("mean", "log_scale", "z", "eps"), np.zeros(shape).tolist()),
        }
        for shape in shapes
    ]
    body = json.dumps({"latents": {"model": "a", "results": [{"levels": levels}] * 256}}).encode()
    try:
        request = parse_sample(RawRequest("application/json", body), shapes)
    except ApiError as error:
        raise AssertionError(error.message) from error
    assert request.count == 256


def test_an_array_whose_shape_has_a_truth_value():
    data = npy(PIXELS[None]).replace(b"(1, 8, 8, 3), }   ", b"(True, 8, 8, 3), }")
    (image,) = parse_images(
        "score", RawRequest("application/x-npy", data[: len(npy(PIXELS[None]))])
    ).sources
    assert np.array_equal(image, PIXELS)


@pytest.mark.parametrize("dtype", ["|u1", "<f4"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, *[int("9" * 2500)] * 3),  # Python does not write the product in decimals
        (10**2000, 8, 8, 3),
        (1, 0, 10**30, 3),
        (1, 10**30, 1, 1),
        (1, -(10**30), 1, 1),
        (10**30,) * 3,
        (0, *[2**24] * 3),
    ],
    ids=range(7),
)
def test_arrays_of_impossible_shapes_are_refused(shape, dtype):
    out = io.BytesIO()
    np.lib.format.write_array_header_2_0(
        out, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    error = refused(parse_images, "score", body(out.getvalue()))
    assert error.status in (400, 422) and len(error.message) < 200
