"""The engine and the service on a real bundle: answers do not depend on batch or backend."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving.api.service import Service
from serving.engine.backends import BACKENDS, BackendError
from serving.engine.cuda import BoundGraph
from serving.engine.engine import BUCKETS, MAX_ROWS, InferenceEngine, NotFinite, Score
from serving.engine.noise import NoiseStream, sample_key
from serving.ingest.requests import RawRequest
from serving.verdict.calibration import CalibrationError
from serving.verdict.calibration_file import CalibrationPair
from tests.helpers import PRETRAINED, with_calibrations


@pytest.fixture
def engine(pretrained_engine):
    return pretrained_engine


@pytest.fixture(scope="module")
def torchscript():
    return InferenceEngine(PRETRAINED, backend="torchscript", device="cpu")


def same(a, b):
    return all(isinstance(x, Score) and x == y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 12, 23, 32, 33, 64])
def test_the_same_bytes_in_any_batch(engine, real_images, batch):
    images = real_images[:64]
    alone = engine.score(images[:1]) + engine.score(images[63:64])
    scores = engine.score(images[64 - batch :])
    assert scores[-1] == alone[1]
    assert batch < 64 or scores[0] == alone[0]
    assert np.array_equal(
        engine.reconstruct(images[64 - batch :])[-1], engine.reconstruct(images[63:])[0]
    )
    assert all(
        np.array_equal(a.z[-1], b.z[0])
        for a, b in zip(
            engine.encode(images[64 - batch :]), engine.encode(images[63:]), strict=True
        )
    )
    samples = engine.sample([5] * batch, list(range(batch)))
    assert np.array_equal(samples[-1], engine.sample([5], [batch - 1])[0])


def test_backends_agree(engine, torchscript, real_images):
    images = real_images[:24]
    for a, b in zip(engine.score(images), torchscript.score(images), strict=True):
        assert abs(a.bpd - b.bpd) <= 1e-4 and a.parts.keys() == b.parts.keys()
    for a, b in (
        (engine.sample([3] * 24, range(24)), torchscript.sample([3] * 24, range(24))),
        (engine.reconstruct(images), torchscript.reconstruct(images)),
    ):
        gap = np.abs(a.astype(int) - b)
        assert gap.max() <= 1 and (gap > 0).mean() <= 1e-4
    assert np.allclose(engine.encode(images)[0].mean, torchscript.encode(images)[0].mean, atol=1e-4)
    alone = torchscript.score(images[:1])[0]
    assert abs(alone.bpd - torchscript.score(images)[0].bpd) <= 1e-5


def test_parts_sum_to_the_bpd(engine, real_images):
    for samples in (1, 5):
        for score in engine.score(real_images[:4], samples=[samples] * 4):
            assert math.isclose(sum(score.parts.values()), score.bpd, abs_tol=1e-9)
            assert ("iwae_gap" in score.parts) == (samples > 1)
            assert (score.standard_error is None) == (samples == 1)


def test_more_draws_tighten_the_bound(engine, real_images):
    images = real_images[:16]
    means = [np.mean([s.bpd for s in engine.score(images, samples=[k] * 16)]) for k in (1, 8, 32)]
    assert means[0] > means[1] > means[2]


def test_the_verdict_does_not_depend_on_seed_or_samples(engine, real_images):
    (base,) = engine.score(real_images[:1])
    (other,) = engine.score(real_images[:1], seeds=[99], samples=[4])
    assert base.verdict is not None and base.verdict == other.verdict and base.bpd != other.bpd
    assert engine.calibration is not None and len(engine.calibration.bpd) == 3000


def test_options_change_samples(engine):
    base = engine.sample([1], [0])
    for other in (
        engine.sample([2], [0]),
        engine.sample([1], [1]),
        engine.sample([1], [0], ["density"]),
        engine.sample([1], [0], temperatures=[0.5]),
    ):
        assert not np.array_equal(base, other)


def test_decoding_the_latents_reconstructs(engine, real_images):
    images = real_images[:3]
    z = [level.z for level in engine.encode(images)]
    assert np.abs(engine.decode(z, [0] * 3).astype(int) - engine.reconstruct(images)).max() <= 1


def test_noise_samples_what_was_encoded(engine, real_images):
    """``eps`` gives ``z`` again; the fewer levels are kept, the more is lost."""
    images, count = real_images[:12], len(engine.latent_shapes)
    levels = engine.encode(images, eps=[True] * 12)
    eps = [level.eps for level in levels]
    from_z = engine.decode([level.z for level in levels], [0] * 12).astype(int)
    from_eps = engine.sample_with(eps, [0] * 12)
    assert (np.abs(from_eps - from_z) <= 1).all() and (from_eps != from_z).mean() < 1e-3
    errors = [
        np.square(
            engine.sample_with(
                [e * (level < kept) for level, e in enumerate(eps)], [0] * 12
            ).astype(int)
            - images
        ).mean()
        for kept in range(1, count + 1)
    ]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.2 * errors[-1]
    mixed = engine.encode(images, eps=[False, True] * 6)
    for one, both in zip(mixed, levels, strict=True):
        assert np.array_equal(one.eps[1::2], both.eps[1::2]) and not one.eps[0::2].any()
        assert np.array_equal(one.z, both.z)


def test_noise_of_a_seed_is_its_sample(engine):
    streams = [NoiseStream(sample_key(7, i)) for i in range(3)]
    eps = [
        np.stack(level)
        for level in zip(
            *([s.normal(shape) for shape in engine.latent_shapes] for s in streams), strict=True
        )
    ]
    assert np.array_equal(engine.sample_with(eps, [0] * 3), engine.sample([7] * 3, range(3)))
    # The decoder's noise is what follows in the stream, not the same numbers again.
    density = ["density"] * 3
    expected = engine.sample([7] * 3, range(3), density)
    assert np.array_equal(engine.sample_with(eps, [7] * 3, density), expected)


def test_a_missing_gpu_is_an_error_not_a_silent_cpu():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        engine = InferenceEngine(PRETRAINED, device="cuda", operations=["score"])
        assert engine.backend.name == "onnxruntime/CUDAExecutionProvider"
        return
    for backend in ("onnxruntime", "torchscript"):
        with pytest.raises(BackendError, match="no CUDA device"):
            InferenceEngine(PRETRAINED, backend=backend, device="cuda")
    with pytest.raises(BackendError, match="device must be one of"):
        InferenceEngine(PRETRAINED, device="tpu")
    with pytest.raises(BackendError, match="backend must be one of"):
        InferenceEngine(PRETRAINED, backend="tensorrt")


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_another_type_or_shape_are_refused(tiny_bundle, small_images, backend):
    """TorchScript would compute with them, and give wrong numbers."""
    engine = InferenceEngine(tiny_bundle, backend, "cpu")
    for method in ("encode", "reconstruct", "score", "statistics", "features"):
        for wrong, got in (
            (small_images[:2] / 255, r"float64 \(2, 8, 8, 3\)"),
            (small_images[:2, :7], r"uint8 \(2, 7, 8, 3\)"),
            (small_images[0], r"uint8 \(8, 8, 3\)"),
            (small_images[:0], r"uint8 \(0, 8, 8, 3\)"),
        ):
            with pytest.raises(ValueError, match=rf"\(N, 8, 8, 3\) with N at least 1, got {got}"):
                getattr(engine, method)(wrong)


def test_scores_take_one_value_per_image(tiny_bundle, small_images):
    engine = InferenceEngine(tiny_bundle, device="cpu", operations=["score"])
    two = small_images[:2]
    arguments: dict[str, Any] = {
        "seeds": [0],
        "samples": [1] * 3,
        "maps": [True],
        "resized": [],
        "calibrations": [engine.calibrations],
    }
    for name, wrong in arguments.items():
        with pytest.raises(ValueError, match=f"{name} must have one value for each of 2 images"):
            engine.score(two, **{name: wrong})
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        engine.score(two, samples=[1, 0])
    zeros = np.zeros(2, int)
    found = engine.score(list(two), seeds=zeros, maps=zeros)  # type: ignore[arg-type]
    assert found == engine.score(two)


@pytest.mark.parametrize("fixed", [False, True])
def test_each_count_runs_in_buckets_if_sizes_are_fixed(tiny_bundle, small_images, fixed):
    """And is padded only then, which changes no score."""
    engine = InferenceEngine(tiny_bundle, device="cpu", operations=["score"])
    sizes: list[int] = []

    class Spy:
        name, fixed_sizes = engine.backend.name, fixed

        def run(self, graph, inputs, wanted=None, whole=engine.backend.run):
            sizes.append(len(inputs["images"]))
            return whole(graph, inputs, wanted)

    expected = engine.score(small_images[: MAX_ROWS + 1])
    engine.backend = Spy()
    for count in range(1, MAX_ROWS + 2):
        sizes.clear()
        assert engine.score(small_images[:count]) == expected[:count]
        if fixed:
            assert set(sizes) <= set(BUCKETS) and count <= sum(sizes) < 2 * count + 1
        else:
            assert sum(sizes) == count


def test_bound_buffers_give_the_same_bytes_and_keep_nothing(engine, real_images):
    """Run the code for CUDA on the CPU: buffers are reused, and later batches change no answer."""
    session = engine.backend._sessions["encode"]
    bound = BoundGraph(session, "cpu", 0, capture=False)
    names = [output.name for output in session.get_outputs()]
    kept = []
    for size, first in ((4, 0), (8, 4), (4, 12), (8, 0)):
        images = real_images[first : first + size]
        rng = np.random.default_rng(first)
        inputs = {
            "images": images,
            **{
                f"eps_{i}": rng.standard_normal((size, *shape), np.float32)
                for i, shape in enumerate(engine.latent_shapes)
            },
        }
        kept.append((bound.run(inputs, names), engine.backend.run("encode", inputs)))
    for found, expected in kept:
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in names)
    assert set(bound.run(inputs, names[:1])) == {names[0]}


def as_json(**values):
    return RawRequest("application/json", values)


def file(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def test_neighbours_of_a_broken_request_get_their_normal_answers(engine, real_images):
    service = Service("score", engine)
    good = [as_json(images=[file(image)]) for image in real_images[:3]]
    expected = [answer.body for request in good for answer in service.answer([request])]
    mixed = [
        good[0],
        RawRequest("image/png", b"junk"),
        good[1],
        as_json(images=[file(real_images[0])], alpha=7),
        RawRequest("application/json", b"{"),
        as_json(images=[file(real_images[5]), "junk"]),
        good[2],
    ]
    answers = service.answer(mixed)
    assert [a.status for a in answers] == [200, 415, 200, 422, 400, 200, 200]
    assert [answers[i].body for i in (0, 2, 6)] == expected
    assert all(a.headers["X-Ade-Batch"] == "4" for a in answers)
    results = json.loads(answers[5].body)["results"]
    assert "bpd" in results[0] and results[1]["error"]["index"] == 1


def test_a_failure_of_one_computation_fails_that_request_alone(engine, real_images, monkeypatch):
    service = Service("score", engine)
    whole = engine.score

    def fails_on_black(images, *options):
        if any(image.max() == 0 for image in images):
            raise RuntimeError("a secret of the server")
        return whole(images, *options)

    monkeypatch.setattr(engine, "score", fails_on_black)
    answers = service.answer(
        [
            as_json(images=[file(real_images[0])]),
            as_json(images=[file(np.zeros((32, 32, 3), np.uint8))]),
        ]
    )
    assert [a.status for a in answers] == [200, 500]
    assert json.loads(answers[1].body)["error"]["code"] == "internal_error"
    assert b"secret" not in answers[1].body


def test_each_path_has_its_own_verdict(tiny_bundle, tmp_path, small_images):
    """In one batch, the same pixels are judged by the calibration of their kind, resized or not."""
    from export.gate.calibrate import calibrate_bundle

    larger = [np.repeat(np.repeat(image, 2, 0), 2, 1) for image in small_images[200:]]
    told: list[str] = []
    made = calibrate_bundle(
        tiny_bundle,
        tmp_path / "out",
        [*small_images[:60], *larger[:30], b"junk"],
        [*small_images[60:160], *larger[30:]],
        "mixed",
        told.append,
    )
    assert made.exact is not None and made.resized is not None
    assert len(made.exact.scores) == 100 and len(made.resized.scores) == 170
    about = json.loads((tmp_path / "out" / "manifest.json").read_text())["calibration"]
    assert about["images"] == 100 and about["resized"]["images"] == 170
    assert about["resized"]["resized_and_back"] == 160
    assert any("left out 1 image: image 90: not an image" in line for line in told)
    assert not any(line.startswith("images of the model's size: ") for line in told)
    calibrate_bundle(
        tiny_bundle,
        tmp_path / "few",
        [*small_images[:10], *larger[:30]],
        [*small_images[10:25], *larger[30:]],
        "few",
        told.append,
    )
    said = "images of the model's size: 25 are fewer than half of all, or too few"
    assert any(line.startswith(said) for line in told)
    engine = InferenceEngine(tmp_path / "out", device="cpu", operations=["score"])
    images = np.stack([small_images[0]] * 3)
    exact, resized, again = engine.score(images, seeds=[0, 5, 0], resized=[False, True, False])
    assert exact.verdict == again.verdict != resized.verdict and resized.verdict is not None
    assert resized.verdict.explain != exact.verdict.explain
    picture = file(np.repeat(np.repeat(small_images[0], 2, 0), 2, 1))
    (answer,) = Service("score", engine).answer(
        [as_json(images=[file(small_images[0]), picture], resize="fit", alpha=0.05)]
    )
    first, second = json.loads(answer.body)["results"]
    assert first["p_value"] == exact.verdict.p_value and second["decision"] in ("accept", "reject")
    assert "notes" not in first and [note.split()[0] for note in second["notes"]] == ["resized"]
    with pytest.raises(CalibrationError, match="exists"):
        calibrate_bundle(tiny_bundle, tmp_path / "out", larger, larger, "larger")
    with pytest.raises(
        CalibrationError, match="fitting: none of 2 images could be used: image 0: not an image"
    ):
        calibrate_bundle(tiny_bundle, tmp_path / "other", [b"junk", b""], larger, "junk")
    few, told = ([*small_images[:3], larger[0]], small_images[4:10]), []
    with pytest.raises(CalibrationError, match=r"at least 50 usable images are needed .* got 10"):
        calibrate_bundle(tiny_bundle, tmp_path / "other", *few, "few", told.append)
    assert not any("scored" in line for line in told)
    assert told[0].endswith("; 1 was resized to 8 x 8 pixels")
    assert not list(tmp_path.glob("other*")) and not list(tmp_path.glob(".other*"))


def test_images_that_stand_for_resized_ones_depend_on_their_pixels_alone(real_images):
    from export.gate.pair import resize_and_back

    made = np.stack([resize_and_back(image).pixels for image in real_images[:20]])
    again = resize_and_back(real_images[7]).pixels
    assert made.dtype == np.uint8 and np.array_equal(made[7], again)
    difference = np.abs(made.astype(float) - real_images[:20]).mean((1, 2, 3))
    assert (difference > 0).all() and difference.max() < 16
    assert resize_and_back(real_images[0][:, :, :1]).pixels.shape == (32, 32, 1)


def test_a_request_without_usable_images_costs_its_neighbours_nothing(
    engine, real_images, monkeypatch
):
    calls = []
    encode = engine.encode
    monkeypatch.setattr(
        engine, "encode", lambda images, *rest: calls.append(len(images)) or encode(images, *rest)
    )
    for eps in (False, True):
        bad, good = Service("encode", engine).answer(
            [as_json(images=["!!"], eps=eps), as_json(images=[file(real_images[0])], eps=not eps)]
        )
        assert (bad.status, good.status) == (400, 200)
    assert calls == [1, 1]


def test_a_group_of_two_calibrations_has_a_note(engine, real_images):
    plain, larger = file(real_images[0]), file(real_images[1].repeat(2, 0).repeat(2, 1))
    mixed, alike = Service("score", engine).answer(
        [as_json(images=[plain, image], resize="fit", fdr=0.5) for image in (larger, plain)]
    )
    (note,) = json.loads(mixed.body)["group"]["notes"]
    assert note.startswith("two calibrations judged these images")
    assert "notes" not in json.loads(alike.body)["group"]


def test_a_group_counts_by_the_smaller_calibration_and_up_to_alpha(real_images, tmp_path):
    def halve(both):
        few = dataclasses.replace(
            both.resized, scores=both.resized.scores[::2], reference=both.resized.reference[::2]
        )
        return dataclasses.replace(both, resized=few)

    halved = InferenceEngine(with_calibrations(PRETRAINED, tmp_path / "halved", halve))
    plain, larger = file(real_images[0]), file(real_images[1].repeat(2, 0).repeat(2, 1))

    def ask(**parameters):
        (answer,) = Service("score", halved).answer(
            [as_json(images=[plain, larger], resize="fit", **parameters)]
        )
        return json.loads(answer.body)

    first = ask(fdr=1e-5)
    count = len(halved.calibrations.resized.scores)
    assert f"the smallest p-value is 1/{count + 1};" in first["group"]["notes"][1]
    least, most = sorted(one["p_value"] for one in first["results"])
    assert ask(fdr=0.5, alpha=most)["group"]["rejected"] == 2 and least < most


def test_an_alpha_that_nothing_can_reach_is_noted(engine):
    smallest = engine.calibration.smallest_p_value
    noise = file(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    least, less = Service("score", engine).answer(
        [as_json(images=[noise], alpha=alpha) for alpha in (smallest, smallest / 2)]
    )
    (reached,), (missed,) = json.loads(least.body)["results"], json.loads(less.body)["results"]
    assert reached["ood"] is True and "notes" not in reached and reached["decision"] == "reject"
    assert missed["ood"] is None and missed["p_value"] > 0 and missed["decision"] == "no_verdict"
    assert missed["decision_reason"].startswith(
        "alpha_too_small: alpha 0.000166611 needs 6,001 calibration images or more"
    )
    assert missed["notes"][0].startswith("nothing can be flagged at alpha 0.000166611: 3000 images")


def test_latents_that_are_not_finite_are_that_image_s_error(engine, real_images, monkeypatch):
    whole = engine.encode

    def corrupted(images, *options):
        levels = whole(images, *options)
        levels[1].z[1, 0, 0, 0] = np.inf
        return levels

    monkeypatch.setattr(engine, "encode", corrupted)
    files = [file(image) for image in real_images[:3]]
    (answer,) = Service("encode", engine).answer([as_json(images=files)])
    (npz,) = Service("encode", engine).answer([as_json(images=files[:2], format="npz")])
    results = json.loads(answer.body)["results"]
    assert answer.status == 200 and [("error" in r) for r in results] == [False, True, False]
    assert results[1]["error"] | {"message": ""} == {
        "code": "not_finite",
        "message": "",
        "index": 1,
    }
    assert npz.status == 422 and json.loads(npz.body)["error"]["index"] == 1


def test_statistics_that_are_not_finite_are_that_image_s_error(engine, real_images, monkeypatch):
    (expected,) = engine.score(real_images[:1])
    whole = engine.backend.run

    def corrupted(graph, inputs, wanted=None):
        outputs = whole(graph, inputs, wanted)
        return {
            **outputs,
            "residual": np.where(
                np.arange(len(inputs["images"]))[:, None, None, None] == 1,
                1e30,
                outputs["residual"],
            ).astype(np.float32),
        }

    monkeypatch.setattr(engine.backend, "run", corrupted)
    with np.errstate(all="ignore"):
        good, bad = engine.score(real_images[:2])
        (answer,) = Service("score", engine).answer(
            [as_json(images=[file(image) for image in real_images[:2]])]
        )
    assert good == expected and isinstance(bad, NotFinite)
    results = json.loads(answer.body)["results"]
    assert answer.status == 200 and results[0]["bpd"] == expected.bpd
    assert results[1]["error"]["code"] == "not_finite"


@pytest.mark.parametrize("samples", [1, 3])
def test_the_map_sums_to_the_bits_of_the_image(engine, real_images, samples):
    images = np.concatenate([real_images[:3], np.full((1, 32, 32, 3), 200, np.uint8)])
    plain = engine.score(images, samples=[samples] * 4)
    mapped = engine.score(images, samples=[samples] * 4, maps=[True, False, True, True])
    for a, b in zip(plain, mapped, strict=True):
        assert a.bpd == b.bpd and a.parts == b.parts and a.verdict == b.verdict
    assert mapped[1].bits is None
    for score in (mapped[0], mapped[2], mapped[3]):
        assert score.bits.shape == (32, 32)
        assert score.bits.sum() == pytest.approx(score.bpd * 3072, rel=1e-9)
    (alone,) = engine.score(images[2:3], samples=[samples], maps=[True])
    assert np.array_equal(alone.bits, mapped[2].bits)


def test_a_map_is_of_the_requested_seed_alone(engine, real_images):
    """The verdict takes a draw of seed 0 besides."""
    (judged,) = engine.score(real_images[:1], [5], maps=[True])
    (bare,) = engine.score(real_images[:1], [5], maps=[True], calibrations=[CalibrationPair()])
    assert judged.verdict and bare.verdict is None and np.array_equal(judged.bits, bare.bits)


def test_the_raw_map_needs_no_correction(engine, real_images):
    """The graph's pixels alone already sum to the score's parts, within float32."""
    from export.parity import make_inputs
    from serving.engine.signatures import inputs_of

    inputs = make_inputs(
        real_images[:8], engine.latent_shapes, inputs_of("score", len(engine.latent_shapes))
    )
    found = engine.backend.run("score", inputs)
    cost, parts = (found[name].astype(np.float64) for name in ("cost", "parts"))
    assert np.allclose(cost.sum((1, 2, 3)), parts.sum(1) * 3072, rtol=1e-5)


def test_a_map_highlights_an_unusual_region(engine, real_images):
    image = real_images[0].copy()
    image[8:16, 16:24] = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    (score,) = engine.score(image[None], maps=[True])
    assert score.bits[8:16, 16:24].mean() > 2 * score.bits[20:, :12].mean()
