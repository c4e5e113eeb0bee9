"""Semantic coordinates: networks of every kind as ``features`` graphs, and their verdict."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn

from ade_cli.main import main
from export.feature_source import FeaturesError, FeatureSource
from export.features import check_source, data_of, feature_graph
from export.gate.calibrate import calibrate_bundle
from export.gate.density_fit import fit_calibration, fit_mixture
from export.gate.measuring import statistics_of
from export.to_onnx import export_encoder
from serving.engine.bundle import (
    FEATURES_NAME,
    open_bundle,
    verify_bundle,
    write_manifest,
)
from serving.engine.engine import InferenceEngine, Score
from serving.gate import Gate
from serving.verdict.calibration import CalibrationError
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.density import NormalScores
from serving.verdict.semantic import (
    DISTANCE,
    ENERGY,
    FEATURES,
    FREE_ENERGY,
    LOGITS,
    PRIOR_IMAGES,
    PROBABILITIES,
    KnownImages,
    semantic_statistics,
)
from tests.helpers import PRETRAINED, make_folder, with_calibrations
from tests.test_ood import draw
from training.data import Dataset, ImageSet
from training.datasets.folder import load_folder
from training.datasets.sketch import record_of
from training.distillation import Distillation
from training.encoder import make_encoder
from training.encoder_network import SmallEncoder
from training.labels import class_labels
from training.metrics import efficientnet
from training.small_encoder import train_small_encoder

MEAN, STD = np.float32([0.5, 0.4, 0.3]), np.float32([0.2, 0.25, 0.3])
STEPS = 15  # of the encoder
SCALE = "scale=0.5 0.4 0.3/0.2 0.25 0.3"


def network(
    path,
    layout="nchw",
    size=8,
    batch=None,
    elem_type=TensorProto.FLOAT,
    ends="Gemm",
    inside=TensorProto.FLOAT,
):
    """A classifier whose features are the means of the channels, times two."""
    shape: list[int | str] = [
        batch or "N",
        *([3, size, size] if layout == "nchw" else [size, size, 3]),
    ]
    axes = [2, 3] if layout == "nchw" else [1, 2]
    rng = np.random.default_rng(0)
    constants = {
        "two": np.float32(2),
        "weight": rng.normal(size=(3, 5)).astype(np.float32),
        "bias": rng.normal(size=5).astype(np.float32),
    }
    if inside == TensorProto.FLOAT16:
        constants = {name: value.astype(np.float16) for name, value in constants.items()}
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=inside),
        helper.make_node("ReduceMean", ["floats"], ["means"], axes=axes, keepdims=0),
        helper.make_node("Mul", ["means", "two"], ["embedding"]),
    ]
    if ends == "Gemm":
        nodes.append(helper.make_node("Gemm", ["embedding", "weight", "bias"], ["scores"]))
    elif ends == "Softmax":
        nodes += [
            helper.make_node("MatMul", ["embedding", "weight"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["probabilities"]),
        ]
    elif ends == "Cast":
        nodes += [
            helper.make_node("Gemm", ["embedding", "weight", "bias"], ["scores"]),
            helper.make_node("Cast", ["scores"], ["floating"], to=TensorProto.FLOAT),
        ]
    last = nodes[-1].output[0]
    last_type = TensorProto.FLOAT if ends == "Cast" else inside
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("pixels", elem_type, shape)],
        [helper.make_tensor_value_info(last, last_type, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return save(graph, path)


def head(path, labels, ends, projection=None):
    """Twelve features of uint8 pixels, then operators, each named like its result."""
    rng = np.random.default_rng(0)
    constants = {
        "weight": rng.normal(size=(12, labels)).astype(np.float32),
        "projection": rng.normal(size=(192, 12)).astype(np.float32) / 1000,
    }
    if projection is not None:
        constants["projection"] = projection
    inputs = [["vectors", "weight"] if ends[0] == "Gemm" else ["vectors"], *([e] for e in ends)]
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("MatMul", ["flat", "projection"], ["vectors"]),
        *(
            helper.make_node(op, its, [op], **({"to": TensorProto.FLOAT} if op == "Cast" else {}))
            for op, its in zip(ends, inputs, strict=False)
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 8, 8, 3])],
        [helper.make_tensor_value_info(ends[-1], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return save(graph, path)


def save(graph, path):
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


def run(content, images):
    import onnxruntime as ort

    session = ort.InferenceSession(content)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


def expected(images):
    return 2 * ((images / 255 - MEAN) / STD).mean((1, 2))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("ends", ["Gemm", "Softmax"])
@pytest.mark.parametrize("batch", [None, 1])
def test_a_classifier_gives_features_and_logits(layout, ends, batch, small_images, tmp_path):
    path = network(tmp_path / "net.onnx", layout, batch=batch, ends=ends)
    made = feature_graph(FeatureSource(path, preprocess=SCALE), small_images)
    found = run(made.content, small_images[:7])
    assert list(found) == ["features", "logits"] and found["logits"].shape == (7, 5)
    np.testing.assert_allclose(found["features"], expected(small_images[:7]), rtol=1e-4, atol=1e-5)
    assert made.about["features"] == 3 and made.about["classes"] == 5
    assert made.about["source"] == "net.onnx" and layout in made.about["preprocessing"]


@pytest.mark.parametrize(
    "labels, ends",
    [(1, ["Gemm"]), (1, ["Gemm", "Sigmoid"]), (5, ["Gemm", "Sigmoid", "Cast"])],
)
def test_labels_that_do_not_exclude_each_other_are_no_classes(labels, ends, small_images, tmp_path):
    path = head(tmp_path / "net.onnx", labels, ends)
    about = feature_graph(FeatureSource(path), small_images).about
    assert (about["features"], about["classes"]) == (12, 0)


def test_probabilities_are_no_features(small_images, tmp_path):
    path = head(tmp_path / "net.onnx", 5, ["Abs", "Softmax", "Flatten"])
    with pytest.raises(FeaturesError, match="the only output, Flatten, comes from Softmax, so"):
        check_source(FeatureSource(path), (8, 8, 3))
    assert feature_graph(FeatureSource(path, "vectors"), small_images).about["features"] == 12
    path = head(tmp_path / "one.onnx", 1, ["Gemm"])
    with pytest.raises(
        FeaturesError, match="at least 2 values, got 1: .* the option features-output"
    ):
        feature_graph(FeatureSource(path, "Gemm"), small_images)


def test_features_that_do_not_vary_are_reported(tiny_bundle, small_images, tmp_path):
    """They all have one direction, so the gate does not see what images show."""
    path = head(tmp_path / "net.onnx", 1, ["Gemm"], np.ones((192, 12), np.float32))
    lines: list[str] = []
    made = calibrate_bundle(
        tiny_bundle,
        tmp_path / "out",
        small_images[:150],
        small_images[150:],
        "c",
        lines.append,
        FeatureSource(path),
    )
    assert made.exact is not None and not made.exact.sees_content
    assert any("do not tell these images apart" in line for line in lines)
    assert not any("the network that sees what images show" in line for line in lines)


@pytest.mark.parametrize("ends", ["Gemm", "Cast"])
def test_a_classifier_in_half_precision(ends, small_images, tmp_path):
    """Also one that casts its logits at the end: they are no features."""
    path = network(tmp_path / "net.onnx", ends=ends, inside=TensorProto.FLOAT16)
    made = feature_graph(FeatureSource(path, preprocess=SCALE), small_images)
    found = run(made.content, small_images[:7])
    assert list(found) == ["features", "logits"] and found["logits"].dtype == np.float32
    np.testing.assert_allclose(found["features"], expected(small_images[:7]), atol=0.01)


def test_colours_in_the_other_order(small_images, tmp_path):
    path = network(tmp_path / "net.onnx")
    source = FeatureSource(path, preprocess="scale=unit,order=bgr")
    found = run(feature_graph(source, small_images).content, small_images[:5])
    means = small_images[:5, :, :, ::-1].mean((1, 2)) / 255
    np.testing.assert_allclose(found["features"], 2 * means, rtol=1e-4)


def test_images_are_resized_to_what_the_network_takes(small_images, tmp_path):
    for path, how in (
        (network(tmp_path / "24.onnx", size=24), SCALE),
        (network(tmp_path / "any.onnx", size=None), f"{SCALE},size=16,layout=nchw"),
    ):
        made = feature_graph(FeatureSource(path, preprocess=how), small_images)
        found = run(made.content, small_images[:5])["features"]
        np.testing.assert_allclose(found, expected(small_images[:5]), atol=0.1)


def test_resized_images_have_every_pixel(tmp_path):
    """227 / 28 is larger than its float32, with which ONNX Runtime makes 226 pixels."""
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 3), dtype=np.uint8)
    path = network(tmp_path / "net.onnx", size=227)
    made = onnx.load_from_string(
        feature_graph(FeatureSource(path, preprocess=SCALE), images).content
    )
    (resize,) = (node for node in made.graph.node if node.op_type == "Resize")
    made.graph.output.append(helper.make_empty_tensor_value_info(resize.output[0]))
    found = run(made.SerializeToString(), images)
    assert found[resize.output[0]].shape == (4, 3, 227, 227)


def test_resized_uint8_pixels_are_rounded(small_images, tmp_path):
    """A cast alone would darken every pixel by half a grey level on average."""
    path = network(tmp_path / "net.onnx", size=24, elem_type=TensorProto.UINT8)
    found = run(feature_graph(FeatureSource(path), small_images).content, small_images[:9])
    pixels = torch.from_numpy(small_images[:9]).permute(0, 3, 1, 2).float()
    resized = nn.functional.interpolate(pixels, (24, 24), mode="bilinear")
    np.testing.assert_allclose(found["features"], 2 * resized.round().mean((2, 3)), atol=0.02)


def test_uint8_pixels_need_no_preprocessing(small_images, tmp_path):
    path = network(tmp_path / "net.onnx", "nhwc", elem_type=TensorProto.UINT8, ends="")
    made = feature_graph(FeatureSource(path), small_images)
    found = run(made.content, small_images[:5])
    assert list(found) == ["features"] and made.about["classes"] == 0
    np.testing.assert_allclose(found["features"], 2 * small_images[:5].mean((1, 2)), rtol=1e-4)


@pytest.mark.parametrize("elem_type", [TensorProto.UINT8, TensorProto.FLOAT])
def test_raw_pixels_of_either_type_and_order(elem_type, small_images, tmp_path):
    path = network(tmp_path / "net.onnx", "nhwc", size=None, elem_type=elem_type)
    source = FeatureSource(path, preprocess="scale=raw,size=8,layout=nhwc,order=bgr")
    found = run(feature_graph(source, small_images).content, small_images[:5])
    means = small_images[:5, :, :, ::-1].mean((1, 2))
    np.testing.assert_allclose(found["features"], 2 * means, rtol=1e-4)


def test_a_named_value_gives_the_features(small_images, tmp_path):
    path = network(tmp_path / "net.onnx")
    source = FeatureSource(path, output="means", preprocess=SCALE)
    found = run(feature_graph(source, small_images).content, small_images[:3])
    np.testing.assert_allclose(
        found["features"], expected(small_images[:3]) / 2, rtol=1e-4, atol=1e-5
    )
    assert "logits" in found


def maps(path, shape, name, perm):
    graph = helper.make_graph(
        [
            helper.make_node("Abs", ["pixels"], ["absolute"]),
            helper.make_node("Transpose", ["absolute"], [name], perm=perm),
        ],
        "g",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
    )
    return FeatureSource(save(graph, path), output=name, preprocess=SCALE)


@pytest.mark.parametrize(
    "shape, perm",
    [
        ([3, 8, 8], [0, 1, 2, 3]),
        ([3, 8, 8], [0, 2, 3, 1]),
        ([8, 8, 3], [0, 1, 2, 3]),
        ([8, 8, 3], [0, 3, 1, 2]),
    ],
)
def test_maps_are_pooled_whatever_their_layout_and_name(shape, perm, small_images, tmp_path):
    for name in ("features", "maps"):
        source = maps(tmp_path / "maps.onnx", shape, name, perm)
        found = run(feature_graph(source, small_images).content, small_images[:3])["features"]
        means = np.abs((small_images[:3] / 255 - MEAN) / STD).mean((1, 2))
        np.testing.assert_allclose(found, means, rtol=1e-4, atol=1e-5)


def test_maps_of_unclear_layout_are_refused(small_images, tmp_path):
    source = maps(tmp_path / "maps.onnx", [8, 8, 3], "maps", [0, 1, 3, 2])
    with pytest.raises(
        FeaturesError, match=r"maps, of shape \(N, 8, 3, 8\), may be \(N, F, H, W\)"
    ):
        feature_graph(source, small_images)


@pytest.mark.parametrize(
    "changes, preprocess, output, message",
    [
        ({}, None, None, "does not say how pixels are scaled"),
        ({}, "scale=2", None, "scale must be one of imagenet"),
        ({}, "colour=1", None, "the preprocessing must be scale=SCALE"),
        ({}, "scale=unit,size=9", None, "takes 8x8 pixels, not size=9"),
        ({}, "scale=unit", "nothing", "the graph has no value 'nothing'"),
        ({"batch": 4}, "scale=unit", None, "has a fixed batch of 4"),
        ({"elem_type": TensorProto.INT64}, "scale=unit", None, "must be of float"),
        ({"elem_type": TensorProto.UINT8}, SCALE, None, "as they are: leave out scale=0.5 0.4"),
    ],
)
def test_what_a_graph_lacks_is_named(
    changes, preprocess, output, message, small_images, tmp_path, tiny_bundle, capsys
):
    path = network(tmp_path / "net.onnx", **changes)
    with pytest.raises(FeaturesError, match=message):
        feature_graph(FeatureSource(path, output, preprocess), small_images)
    given = [
        "--features",
        str(path),
        *(["--features-preprocess", preprocess] if preprocess else []),
    ]
    given += ["--features-output", output] if output else []
    # Before the images are read, of which there are none here.
    command = ["calibrate", str(tiny_bundle), str(tmp_path / "out"), "--data", str(tmp_path)]
    assert main([*command, *given]) == 2
    assert message in capsys.readouterr().err
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(FeaturesError, match="is not a usable ONNX graph"):
        feature_graph(FeatureSource(tmp_path / "junk.onnx"), small_images)
    os.mkfifo(tmp_path / "pipe.onnx")  # opening it would wait for a writer
    with pytest.raises(FeaturesError, match="pipe.onnx is not .* it is not a regular file"):
        feature_graph(FeatureSource(tmp_path / "pipe.onnx"), small_images)


def test_a_file_without_operators_of_onnx_is_refused(small_images, tmp_path):
    path = network(tmp_path / "net.onnx")
    foreign = helper.make_model(onnx.load(path).graph, opset_imports=[helper.make_opsetid("x", 1)])
    for content in (b"", foreign.SerializeToString()):
        path.write_bytes(content)
        with pytest.raises(FeaturesError, match="net.onnx .* imports no operators of ONNX"):
            feature_graph(FeatureSource(path), small_images)


def test_weights_that_were_cut_off_are_no_traceback(small_images, tmp_path):
    path = network(tmp_path / "net.onnx")
    onnx.save(
        onnx.load(path), str(path), save_as_external_data=True, location="w", size_threshold=0
    )
    feature_graph(FeatureSource(path, preprocess=SCALE), small_images)
    os.truncate(tmp_path / "w", 9)
    with pytest.raises(FeaturesError, match="net.onnx is not a usable ONNX graph"):
        feature_graph(FeatureSource(path, preprocess=SCALE), small_images)


def test_the_graph_of_a_bundle_is_a_network_like_any_other(real_images, tmp_path):
    """Of one that was used twice, too. It takes these images already, so nothing is added."""
    path = PRETRAINED / "features.onnx"
    graphs = [path.read_bytes()]
    for step in range(2):
        graph = feature_graph(FeatureSource(path), real_images)
        graphs.append(graph.content)
        path = tmp_path / f"{step}.onnx"
        path.write_bytes(graph.content)
    first, *others = (
        onnxruntime.InferenceSession(g).run(None, {"images": real_images[:4]}) for g in graphs
    )
    for other in others:
        np.testing.assert_array_equal(first[0], other[0])
    assert len({len(onnx.load_from_string(g).graph.node) for g in graphs}) == 1


def test_features_that_do_not_tell_images_apart_are_refused(small_images, tmp_path):
    same = np.repeat(small_images[:1], 4, axis=0)
    path = network(tmp_path / "net.onnx")
    with pytest.raises(FeaturesError, match="of different images are the same"):
        feature_graph(FeatureSource(path, preprocess=SCALE), same)


def features(seed, count, width=20):
    return np.abs(np.random.default_rng(seed).normal(size=(count, width))).astype(np.float32)


def test_coordinates_by_hand():
    some, others = features(0, 50), features(1, 7)
    known = KnownImages.of({FEATURES: some})

    def distances(images, neighbours, of_main):
        """To the tenth nearest, outside the main directions of some images."""
        images, neighbours, of_main = (
            its / np.linalg.norm(its, axis=1, keepdims=True)
            for its in (images, neighbours, of_main)
        )
        main = np.linalg.svd(of_main)[2][:5]  # a quarter of the 20 features
        outside = [its - its @ main.T @ main for its in (images, neighbours)]
        apart = np.square(outside[0][:, None] - outside[1]).sum(2) / 2 - 1
        found: np.ndarray = np.sort(apart, axis=1)[:, 9]
        return found

    # Where the density is fitted, an image is not its own neighbour, and every tenth image is left
    # out of the main directions together with it.
    own = np.array(
        [
            distances(some[[i]], np.delete(some, i, axis=0), some[np.arange(50) % 10 != i % 10])[0]
            for i in range(50)
        ]
    )
    assert known.main.shape == (20, 5)
    found = known.coordinates({FEATURES: others})
    assert list(found) == [DISTANCE]
    expected = (distances(others, some, some) - own.mean()) / own.std()
    np.testing.assert_allclose(found[DISTANCE], expected, atol=4e-2)
    own_found = known.coordinates({FEATURES: some}, known=True)[DISTANCE]
    np.testing.assert_allclose(own_found, (own - own.mean()) / own.std(), atol=4e-2)


def test_what_lies_outside_the_main_directions_counts():
    """Images vary in 40 directions, and little in 160 others; unusual ones have more in one."""
    rng = np.random.default_rng(0)

    def images(spread, unusual=0):
        values = rng.normal(size=(300, 200)) * np.repeat([1, spread], [40, 160])
        values[:, -1] += unusual
        return values.astype(np.float32)

    some, usual, unusual = images(0.2), images(0.2), images(0.2, unusual=3)
    known = KnownImages.of({FEATURES: some})
    assert known.main.shape == (200, 48)

    def found(known):
        distances = [known.coordinates({FEATURES: its})[DISTANCE] for its in (usual, unusual)]
        return float((distances[1] > np.quantile(distances[0], 0.95)).mean())

    assert found(known) > 0.9 and found(dataclasses.replace(known, main=known.main[:, :0])) < 0.4
    # The known images count as new ones would.
    own = known.coordinates({FEATURES: some}, known=True)[DISTANCE]
    assert abs(known.coordinates({FEATURES: usual})[DISTANCE].mean() - own.mean()) < 0.3
    # If images have hardly anything outside, as in a classifier's features, all directions count.
    assert KnownImages.of({FEATURES: images(0.05)}).main.shape == (200, 0)


@pytest.mark.parametrize("count", [2, 3, 12, 60])
@pytest.mark.parametrize("shape", ["usual", "one direction", "zero"])
def test_few_or_equal_known_images(count, shape):
    some = features(0, count)
    if shape == "one direction":
        some = np.linspace(1, 2, count, dtype=np.float32)[:, None] * some[:1]
    elif shape == "zero":
        some = 0 * some
    known = KnownImages.of({FEATURES: some})
    most = 0 if shape == "one direction" else min(5, int(0.4 * count))
    assert known.problem() is None and known.main.shape == (20, most)
    assert np.isfinite(known.coordinates({FEATURES: features(1, 7)})[DISTANCE]).all()


def test_what_is_usual_depends_on_the_class():
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 2], [400, 100])
    energy = np.where(classes == 0, -8 + rng.normal(size=500), -3 + 0.5 * rng.normal(size=500))
    shares = np.eye(3)[classes]
    known = KnownImages.of({FEATURES: features(0, 500), FREE_ENERGY: energy, PROBABILITIES: shares})
    assert known.usual.shape == (3, 2, 2) and known.problem() is None
    for number in (0, 1, 2):  # ten images of all classes belong to each one
        own, everyone = energy[classes == number], np.array([energy.mean(), energy.var()])
        count = len(own) + PRIOR_IMAGES
        mean = (own.sum() + PRIOR_IMAGES * everyone[0]) / count
        prior = PRIOR_IMAGES * (everyone[1] + (everyone[0] - mean) ** 2)
        spread = np.sqrt((np.square(own - mean).sum() + prior) / count)
        np.testing.assert_allclose(known.usual[number, 1], [mean, spread])

    def found(share):
        statistics = {FEATURES: features(1, 1), FREE_ENERGY: np.array([-3.0])}
        statistics[PROBABILITIES] = np.array([share])
        return float(known.coordinates(statistics)[ENERGY][0])

    assert found([1, 0, 0]) > 4 and abs(found([0, 0, 1])) < 0.7
    # Nothing jumps where two classes are equally probable.
    assert found([1, 0, 0]) > found([0.51, 0, 0.49]) > found([0.49, 0, 0.51]) > found([0, 0, 1])
    assert found([0.51, 0, 0.49]) - found([0.49, 0, 0.51]) < 0.2


def test_a_network_with_other_classes_is_noticed():
    both = {FEATURES: features(0, 50), FREE_ENERGY: features(1, 50)[:, 0]}
    both[PROBABILITIES] = np.full((50, 4), 0.25)
    known, bare = KnownImages.of(both), KnownImages.of({FEATURES: both[FEATURES]})
    for statistics in (
        {FEATURES: both[FEATURES]},
        {**both, PROBABILITIES: np.full((50, 5), 0.2)},
    ):
        with pytest.raises(ValueError, match="do not fit known images"):
            known.coordinates(statistics)
    # Known images without classes are judged without any.
    alone = bare.coordinates({FEATURES: both[FEATURES]})
    assert list(alone) == list(bare.coordinates(both)) == [DISTANCE]
    np.testing.assert_array_equal(alone[DISTANCE], bare.coordinates(both)[DISTANCE])


@pytest.mark.parametrize("constant", [DISTANCE, ENERGY])
def test_a_coordinate_that_does_not_vary_is_left_out(constant):
    rng = np.random.default_rng(0)
    sets = [semantic_draw(rng, 100), semantic_draw(rng, 100), semantic_draw(rng, 10)]
    for statistics in sets:
        if constant == ENERGY:
            statistics[FREE_ENERGY][:] = -12.34
        else:
            statistics[FEATURES][:] = 1.5
    fitted = fit_calibration(*sets[:2])
    fitted.check_values()
    assert {DISTANCE, ENERGY} - set(fitted.names) == {constant}
    assert np.isfinite(fitted.scores_of(sets[2])).all()


def test_coordinates_do_not_depend_on_the_batch():
    def draw_of(seed, count):
        logits = 9 * features(seed + 1, count, 33)
        return semantic_statistics({FEATURES: features(seed, count, 257), LOGITS: logits})

    known, others = KnownImages.of(draw_of(0, 500)), draw_of(2, 33)
    many = known.coordinates(others)
    for i in range(33):
        one = known.coordinates({name: values[i : i + 1] for name, values in others.items()})
        assert all(one[name][0] == many[name][i] for name in (DISTANCE, ENERGY))


def semantic_draw(rng, n):
    return {
        **draw(rng, n),
        FEATURES: np.abs(rng.normal(size=(n, 12))).astype(np.float32),
        FREE_ENERGY: rng.normal(size=n).astype(np.float32),
        PROBABILITIES: rng.dirichlet(np.ones(3), n).astype(np.float32),
    }


def test_semantic_statistics_join_the_score_and_keep_the_false_alarm_rate():
    rng = np.random.default_rng(0)
    fitted = fit_calibration(semantic_draw(rng, 500), semantic_draw(rng, 1999))
    assert fitted.names[-2:] in ((DISTANCE, ENERGY), (ENERGY, DISTANCE))
    assert fitted.mixture.means.shape[1] == len(fitted.names) - 2
    assert fitted.summary()["statistic"] == "density of 4 statistics, 2 semantic ones"
    usual = fitted.verdicts(semantic_draw(rng, 2000))
    for alpha in (0.1, 0.01):
        assert abs(np.mean([v.p_value <= alpha for v in usual]) - alpha) < 0.35 * alpha + 0.01
    unusual = semantic_draw(rng, 50)
    unusual[FREE_ENERGY] += 9
    unusual[FEATURES] = np.eye(12, dtype=np.float32)[np.arange(50) % 12]
    found = fitted.verdicts(unusual)
    assert np.mean([v.p_value <= 0.01 for v in found]) > 0.95
    assert {u.statistic for u in found[0].explain[:2]} == {DISTANCE, ENERGY}


def test_no_known_image_is_its_own_neighbour():
    rng = np.random.default_rng(0)
    fit, others = semantic_draw(rng, 60), semantic_draw(rng, 60)
    fitted = fit_calibration(fit, others)
    distances = fitted.known.coordinates(fit, known=True)[DISTANCE]
    column = fitted.names.index(DISTANCE)
    assert np.array_equal(
        fitted.normal.grid[:, column], NormalScores.fit(distances[:, None]).grid[:, 0]
    )


@pytest.mark.parametrize("alike", [1 / 2, 3 / 4])
def test_usual_values_of_the_density_do_not_count_beside_the_coordinates(alike):
    """Only unusual ones do."""
    rng = np.random.default_rng(0)

    def sets():
        made = semantic_draw(rng, 500)
        if alike == 1 / 2:  # hardly anything is outside the main directions
            made[FEATURES] = 1 + 0.01 * made[FEATURES]
        return made

    fitted = fit_calibration(sets(), sets())
    assert fitted.known is not None and bool(fitted.known.main.size) == (alike == 3 / 4)
    normal = fitted.normal(fitted.rows(sets()))
    normal[:, -2:] = 0.5
    density = fitted.mixture.negative_log_density(normal[:, :-2])
    order = np.argsort(density)
    scores = fitted.ood_scores(normal)[order]
    usual = np.sum(scores == scores[0])
    assert abs(usual - 500 * alike) < 60 and (np.diff(scores[usual:]) > 0).all()
    assert np.ptp(scores) == pytest.approx(density[order[-1]] - density[order[usual - 1]], rel=0.1)


def test_coordinates_count_with_few_images_too():
    """The density is surer of the few images that it was fitted to than of any others."""
    rng = np.random.default_rng(0)
    wide = [
        {**semantic_draw(rng, n), **{f"pixel_{i}": rng.normal(size=n) for i in range(20)}}
        for n in (30, 300, 300)
    ]
    wide[2][FREE_ENERGY] += 4
    fitted = fit_calibration(wide[0], wide[1])
    usual, unusual = ([v.ood_score for v in fitted.verdicts(its)] for its in wide[1:])
    assert np.mean(np.array(unusual) > np.quantile(usual, 0.9)) > 0.5


def test_a_score_that_is_not_finite_is_never_accepted():
    rng = np.random.default_rng(0)
    fitted = fit_calibration(semantic_draw(rng, 200), semantic_draw(rng, 200))
    assert fitted.known is not None
    assert np.isposinf(fitted.ood_scores(np.full((1, len(fitted.names)), np.nan))).all()
    huge = dataclasses.replace(fitted, known=dataclasses.replace(fitted.known, weight=1e308))
    with np.errstate(over="ignore"):
        found = huge.verdicts(semantic_draw(rng, 50))
    overflowed = [v.p_value for v in found if not np.isfinite(v.ood_score)]
    assert len(overflowed) > 5 and set(overflowed) == {huge.smallest_p_value}


def test_without_features_the_score_is_the_density_s():
    rng = np.random.default_rng(0)
    fitted = fit_calibration(draw(rng, 500), draw(rng, 500))
    normal = fitted.normal(fitted.rows(draw(rng, 30)))
    assert (fitted.ood_scores(normal) == fitted.mixture.negative_log_density(normal)).all()
    assert fitted.known is None and not [n for n in fitted.arrays() if n.startswith("known")]


@pytest.fixture(scope="module")
def semantic_bundle(tiny_bundle, small_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("semantic")
    source = FeatureSource(network(folder / "net.onnx"), preprocess=SCALE)
    out = folder / "semantic"
    calibrate_bundle(tiny_bundle, out, small_images[:150], small_images[150:], "c", features=source)
    return out


def test_a_bundle_with_features_scores_with_them(semantic_bundle, tiny_bundle, small_images):
    bundle = verify_bundle(semantic_bundle)
    assert bundle.manifest["features"]["classes"] == 5 and bundle.has(FEATURES_NAME)
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    engine.warm_up()
    many = engine.score(small_images[:40])
    for i in (0, 17, 39):
        assert engine.score(small_images[i : i + 1]) == [many[i]]
    plain = InferenceEngine(tiny_bundle, device="cpu", operations=["score"]).score(small_images[:1])
    assert isinstance(many[0], Score) and isinstance(plain[0], Score)
    assert many[0].verdict is not None and plain[0].verdict is not None
    assert many[0].bpd == plain[0].bpd
    named = {u.statistic for u in many[0].verdict.explain}
    assert named - {u.statistic for u in plain[0].verdict.explain} == {DISTANCE, ENERGY}
    # Other operations do not load the network.
    assert not InferenceEngine(bundle, device="cpu", operations=["sample"]).features(
        small_images[:1]
    )


def test_torchscript_gives_the_same_verdicts(semantic_bundle, small_images):
    both = [
        InferenceEngine(semantic_bundle, backend, "cpu", ["score"]).statistics(small_images[:9])
        for backend in ("onnxruntime", "torchscript")
    ]
    assert (both[0][FEATURES] == both[1][FEATURES]).all()


def test_statistics_do_not_depend_on_the_threads(semantic_bundle, small_images, monkeypatch):
    """More images than a chunk has, so that the last batch is a short one."""
    engine = InferenceEngine(semantic_bundle, device="cpu", operations=["score"])
    expected = engine.statistics(small_images)
    for cores in (1, 3):
        monkeypatch.setattr("export.gate.images.available_cores", lambda cores=cores: cores)
        found = statistics_of(engine, small_images, "corners")
        assert list(found) == list(expected)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_calibrating_again_keeps_the_features(semantic_bundle, small_images, tmp_path):
    made = calibrate_bundle(
        semantic_bundle, tmp_path / "again", small_images[:150], small_images[150:], "c"
    )
    before = CalibrationPair.load(semantic_bundle / "calibration.npz")
    assert made.exact is not None and before.exact is not None and made.resized is not None
    assert (made.exact.scores == before.exact.scores).all() and made.resized.known is not None
    assert open_bundle(tmp_path / "again").manifest["features"]["source"] == "net.onnx"


def test_classes_that_the_network_does_not_know_are_left_out(tiny_bundle, small_images, tmp_path):
    """If it is much less sure of the images than of those of the bundle's own calibration."""
    dark = (small_images // 3).astype(np.uint8)
    source = FeatureSource(network(tmp_path / "net.onnx"), preprocess="scale=signed")
    noted = []
    for name, own, others in (("a", dark, 255 - dark), ("b", 255 - dark, dark)):
        first, second = tmp_path / f"{name}1", tmp_path / f"{name}2"
        calibrate_bundle(tiny_bundle, first, own[:150], own[150:], "c", features=source)
        lines: list[str] = []
        made = calibrate_bundle(first, second, others[:150], others[150:], "c", lines.append)
        noted.append(any("does not know what these images show" in line for line in lines))
        for calibration in (made.exact, made.resized):
            assert calibration is not None
            assert (ENERGY in calibration.names) != noted[-1] and DISTANCE in calibration.names
        if noted[-1]:
            found = Gate(second, alpha=0.1).check(others[150:])
            assert sum(decision.accepted for decision in found) > 120
            again = calibrate_bundle(second, tmp_path / "again", others[:150], own[150:], "c")
            assert again.exact is not None and ENERGY not in again.exact.names
    assert sorted(noted) == [False, True], "it is surer of one kind than of the other"


def test_a_calibration_whose_network_is_missing_is_refused(semantic_bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(semantic_bundle, copy)
    (copy / FEATURES_NAME).unlink()
    write_manifest(copy, open_bundle(semantic_bundle).manifest)
    with pytest.raises(CalibrationError, match=f"without features.onnx: {DISTANCE}, .*; ade calib"):
        InferenceEngine(copy, device="cpu", operations=["score"])


def test_a_calibration_without_features_stays_valid_beside_them(
    semantic_bundle, tiny_bundle, small_images, tmp_path
):
    plain = CalibrationPair.load(tiny_bundle / "calibration.npz")
    both = with_calibrations(semantic_bundle, tmp_path / "both", lambda _: plain)
    scores = [
        InferenceEngine(folder, device="cpu", operations=["score"]).score(small_images[:9])
        for folder in (both, tiny_bundle)
    ]
    for found, expected in zip(*scores, strict=True):
        assert isinstance(found, Score) and isinstance(expected, Score)
        assert found.verdict is not None and found.verdict == expected.verdict


@pytest.fixture(scope="module")
def night_bundle(semantic_bundle, small_images, tmp_path_factory):
    """With a named calibration for dark images."""
    folder = tmp_path_factory.mktemp("night") / "bundle"
    dark = small_images // 8
    made = calibrate_bundle(
        semantic_bundle, folder, dark[:150], dark[150:], "dark", calibration="night"
    )
    assert made.exact is not None and made.exact.known is not None
    return folder


def test_named_calibrations_are_tied_to_the_features(
    night_bundle, tiny_bundle, small_images, tmp_path
):
    halves = (small_images[:150], small_images[150:])
    kept, other = tmp_path / "kept", tmp_path / "other"
    lines: list[str] = []
    calibrate_bundle(night_bundle, kept, *halves, "c", lines.append)
    assert "night" in InferenceEngine(kept, operations=["score"]).named
    assert not any("left out the calibrations" in line for line in lines)
    source = FeatureSource(network(tmp_path / "other.onnx"), preprocess="scale=unit")
    calibrate_bundle(night_bundle, other, *halves, "c", lines.append, source)
    assert any(line.startswith("left out the calibrations night: ") for line in lines)
    assert list(InferenceEngine(other, operations=["score"]).named) == ["default"]
    assert open_bundle(other).manifest["calibrations"] is None


def test_a_calibration_of_other_features_is_refused(night_bundle, tiny_bundle, tmp_path):
    plain = Path(shutil.copytree(tiny_bundle, tmp_path / "plain"))
    shutil.copy(night_bundle / "calibration-night.npz", plain)
    write_manifest(plain, open_bundle(tiny_bundle).manifest)
    with pytest.raises(CalibrationError, match=rf"without features.onnx: .*{DISTANCE}"):
        InferenceEngine(plain, operations=["score"])


def test_damaged_features_of_known_images_are_noticed():
    rng = np.random.default_rng(0)
    good = fit_calibration(semantic_draw(rng, 200), semantic_draw(rng, 200))
    good.check_values()
    assert good.known is not None
    vectors, main, usual = good.known.directions, good.known.main, good.known.usual
    for known, message in (
        (
            KnownImages(vectors.astype(np.float32), main, usual, 1.0),
            "known_directions must be int16",
        ),
        (KnownImages(vectors[0], main, usual, 1.0), "known_directions must be int16"),
        (KnownImages(vectors[:1], main, usual, 1.0), "m at least 2, got int16 .1, 12"),
        (KnownImages(vectors, main.T, usual, 1.0), "known_main must be int16 of shape .12, D."),
        (KnownImages(vectors, 1.0 * main, usual, 1.0), "known_main must be int16 of shape .12, D."),
        (KnownImages(vectors, main[0], usual, 1.0), "known_main must be int16 of shape .12, D."),
        (KnownImages(vectors, main, usual[0], 1.0), "known_usual must be numbers of shape"),
        (KnownImages(vectors, main, usual[:, :, :1], 1.0), "known_usual must be numbers of shape"),
        (
            KnownImages(vectors, main, usual.astype(str), 1.0),
            "known_usual must be numbers of shape",
        ),
        (KnownImages(vectors, main, usual[:0], 1.0), "known_usual must be finite means"),
        (KnownImages(vectors, main, usual[:, :1], 1.0), "known_usual lacks semantic_energy"),
        (
            KnownImages(vectors, main, 0 * usual, 1.0),
            "known_usual must be finite means and positive",
        ),
        (KnownImages(vectors, main, usual + np.inf, 1.0), "known_usual must be finite means"),
        (KnownImages(vectors, main, usual, float("nan")), "known_weight must be a finite number"),
        (KnownImages(vectors, main, usual, -1.0), "known_weight must be a finite number"),
        (
            KnownImages(vectors, main, usual, 1.0, float("nan")),
            "known_floor must be a number below",
        ),
        (KnownImages(vectors, main, usual, 1.0, np.inf), "known_floor must be a number below"),
        (None, "must come last, with known images"),
    ):
        with pytest.raises(CalibrationError, match=message):
            dataclasses.replace(good, known=known).check_values()
    names = (good.names[-1], *good.names[:-1])
    with pytest.raises(CalibrationError, match="must come last"):
        dataclasses.replace(good, names=names).check_values()
    wide = fit_mixture(rng.normal(size=(100, len(names))))
    with pytest.raises(CalibrationError, match="mixture_means must be finite"):
        dataclasses.replace(good, mixture=wide).check_values()


def test_images_that_the_network_has_seen_are_noticed(tiny_bundle, small_images, tmp_path):
    """A network with longer features for darker images acts like one that was trained on them."""
    dark = (small_images // 3).astype(np.uint8)
    source = FeatureSource(network(tmp_path / "net.onnx"), preprocess="scale=signed")
    for name, unseen, warns in (("a", small_images[:100], True), ("b", dark[:100], False)):
        lines: list[str] = []
        calibrate_bundle(
            tiny_bundle, tmp_path / name, dark[:150], dark[150:], "c", lines.append, source, unseen
        )
        assert any("must not have been trained on any of these images" in line for line in lines)
        assert any("WARNING: the network has probably seen" in line for line in lines) == warns


@pytest.mark.usefixtures("mean_colours")
def test_a_small_encoder_learns_to_tell_things_apart(tmp_path, monkeypatch):
    """A few steps suffice for stripes and checks; the exported graph agrees with the network."""
    # A clock that ticks once per step, so that the number of steps does not depend on the machine.
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 60 * next(ticks) / STEPS)
    monkeypatch.setattr("training.small_encoder.time", clock)
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 2, 600)
    grid = np.indices((16, 16)).sum(0) % 4 < 2
    stripes = np.broadcast_to(np.arange(16) % 4 < 2, (16, 16))
    patterns = np.stack([grid, stripes]).astype(np.float32)[kinds][..., None]
    images = (
        (60 + 100 * patterns + rng.normal(0, 25, (600, 16, 16, 3))).clip(0, 255).astype(np.uint8)
    )
    trained = train_small_encoder(ImageSet(images[:500], kinds[:500]), 1, torch.device("cpu"))
    assert trained.classes == 2 and trained.images_seen > 500
    data = {"name": os.fsdecode(b"caf\xe9"), "splits": {"train": "train[0:500]"}}
    export_encoder(trained.network, images[:2], trained.outputs, tmp_path / "net.onnx", data)
    assert data_of(tmp_path / "net.onnx") == data
    made = feature_graph(FeatureSource(tmp_path / "net.onnx"), images)
    assert made.about["data"] == data
    found = run(made.content, images[500:])
    assert list(found) == trained.outputs
    with torch.inference_mode():
        eager = trained.network(torch.from_numpy(images[500:]))[0].numpy()
    np.testing.assert_allclose(found["features"], eager, rtol=1e-3, atol=1e-4)
    known = run(made.content, images[:500])["features"]
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    nearest = (found["features"] @ known.T).argmax(1)
    assert (kinds[:500][nearest] == kinds[500:]).mean() > 0.9


@pytest.fixture(scope="module")
def exported_once():
    """EfficientNet's features, which export a graph when they are made; every encoder has these."""
    made = efficientnet.EfficientNetFeatures()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.encoder.EfficientNetFeatures", lambda: made)
        yield made


def test_a_network_trained_on_imagenet_is_the_encoder(exported_once, real_images, tmp_path):
    """Its features vary about equally, and are the same alone, in a batch and in PyTorch."""
    images = real_images[:40].copy()
    for labels in (None, np.zeros(len(images), int)):
        made = make_encoder(ImageSet(images, labels))
        assert (made.classes, made.outputs, made.images_seen) == (0, ["features"], len(images))
    path = tmp_path / "net.onnx"
    export_encoder(made.network, images[:2], made.outputs, path)
    graph = feature_graph(FeatureSource(path), images)
    found = run(graph.content, images)["features"]
    assert found.shape == (len(images), efficientnet.FEATURES)
    spread = exported_once(images).std(0)
    np.testing.assert_allclose(found.std(0), spread / (spread + 0.05), rtol=0.01, atol=1e-3)
    alone = [run(graph.content, images[i : i + 1])["features"] for i in range(4)]
    np.testing.assert_array_equal(np.concatenate(alone), found[:4])
    with torch.inference_mode():
        eager = made.network(torch.from_numpy(images[:4]))[0].numpy()
    np.testing.assert_allclose(found[:4], eager, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("exported_once")
def test_the_encoder_learns_classes(real_images, tmp_path):
    """Of images that its network has never seen; the exported graph gives the same logits."""
    images = real_images
    upright = np.arange(len(images)) % 2 == 0
    images = np.where(upright[:, None, None, None], images, images[:, ::-1])
    made = make_encoder(ImageSet(images[:240], np.where(upright[:240], 7, 3)))
    assert (made.classes, made.outputs, made.images_seen) == (2, ["features", "logits"], 240)
    path = tmp_path / "net.onnx"
    export_encoder(made.network, images[:2], made.outputs, path)
    found = run(feature_graph(FeatureSource(path), images).content, images)
    with torch.inference_mode():
        eager = made.network(torch.from_numpy(images[:4]))[1].numpy()
    np.testing.assert_allclose(found["logits"][:4], eager, rtol=1e-3, atol=1e-3)
    is_right = (found["logits"].argmax(1) == 1) == upright
    assert is_right[:240].all() and is_right[240:].mean() > 0.7


@pytest.mark.usefixtures("mean_colours")
def test_a_small_encoder_learns_from_the_images_that_its_teacher_saw():
    """The teacher stops when its time is over; other images have no distance from its features."""
    images = np.random.default_rng(0).integers(0, 256, (130, 8, 8, 3), np.uint8)
    everything = Distillation(images, 4, 60.0, 0)
    assert everything.rows.tolist() == list(range(130))
    colours = images.mean((1, 2))
    wanted = colours - colours.mean(0)
    tiled = np.tile(wanted, efficientnet.FEATURES)[:, : efficientnet.FEATURES]
    wanted /= np.linalg.norm(tiled, axis=1, keepdims=True)
    found = everything.targets[everything.places].float().numpy()
    np.testing.assert_allclose(found[:, :3], wanted, atol=1e-3)

    hurried = Distillation(images, 4, 0.0, 0)
    assert len(hurried.rows) == efficientnet.BATCH and hurried.rows.tolist() == sorted(
        set(hurried.rows)
    )
    others = torch.from_numpy(np.setdiff1d(np.arange(130), hurried.rows))
    features = torch.randn(len(others), 4)
    assert hurried(features, others).item() == 0
    rows = torch.from_numpy(hurried.rows)
    assert 0 < hurried(torch.randn(len(rows), 4), rows).item() < 2


@pytest.mark.usefixtures("mean_colours")
@pytest.mark.parametrize("is_faster", [True, False])
def test_a_small_encoder_is_trained_in_bfloat16_only_where_that_is_faster(
    is_faster, small_images, monkeypatch
):
    monkeypatch.setattr("training.small_encoder.bfloat16_is_faster", lambda device: is_faster)

    def forward(self, images):
        raise RuntimeError(f"in bfloat16: {torch.is_autocast_enabled('cpu')}")

    monkeypatch.setattr(SmallEncoder, "forward", forward)
    images = ImageSet(small_images[:16], np.arange(16) % 2)
    with pytest.raises(RuntimeError, match=f"in bfloat16: {is_faster}"):
        train_small_encoder(images, 1, torch.device("cpu"))


def test_an_encoder_replaces_no_file(tmp_path, capsys):
    """It is refused before the images are read, also in the place of a link that leads nowhere."""
    (tmp_path / "file.onnx").touch()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "target.onnx")
    for name in ("file.onnx", "link.onnx"):
        assert main(["encoder", str(tmp_path / name), "--data", str(tmp_path / "nowhere")]) == 2
        assert f"{name} exists: take another name" in capsys.readouterr().err


def test_class_labels_come_from_folders():
    images = ImageSet(np.zeros((80, 8, 8, 3), np.uint8))

    def labels(name):
        files = {"train": [name(i) for i in range(80)]}
        return class_labels(Dataset("d", {"train": images}, {}, [], files))

    found = labels(lambda i: f"{'cat' if i % 2 else 'dog'}/x/{i}.png")
    assert found is not None and found.tolist() == [(i + 1) % 2 for i in range(80)]
    assert labels(lambda i: f"{i}.png") is None and labels(lambda i: f"a/{i}.png") is None
    assert labels(lambda i: f"{i}/x.png") is None
    given = dataclasses.replace(images, labels=np.arange(80) % 3)
    assert class_labels(Dataset("d", {"train": given}, {})) is given.labels


def test_the_encoder_of_larger_images_sees_them_smaller():
    network = SmallEncoder(96, 3).eval()
    assert network.shrink == 3
    assert network(torch.zeros(2, 96, 96, 3, dtype=torch.uint8))[0].shape == (2, 256)
    assert isinstance(network.blocks, nn.Sequential)


@pytest.mark.usefixtures("mean_colours")
def test_the_command_line(tiny_bundle, small_images, tmp_path, capsys):
    folder = make_folder(tmp_path / "pictures", small_images[:200])
    (folder / "wide.png").unlink()  # in no class folder
    out = tmp_path / "encoder.onnx"
    small = ["encoder", str(out), "--data", str(folder), "--small"]
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    Image.new("RGB", (400, 300)).save(photographs / "a.jpg")
    assert main([*small[:3], str(photographs)]) == 2
    assert "300 pixels per side" in capsys.readouterr().err
    assert main([*small, "--minutes", "0.02"]) == 0
    trained = len(load_folder(folder, None, None, lambda line: None).parts["train"].images)
    assert f"trained on {trained} images, each seen " in capsys.readouterr().err
    for minutes in ("0", "inf", "nan"):
        assert main([*small, "--minutes", minutes]) == 2
        assert "--minutes must be above 0 and finite" in capsys.readouterr().err
    assert data_of(out) == record_of(load_folder(folder, None, None, lambda line: None))
    large = ["encoder", str(tmp_path / "b.onnx"), "--data", str(folder)]
    assert main([*large, "--minutes", "1"]) == 2
    assert "--minutes goes with --small" in capsys.readouterr().err
    assert main([*large, "--device", "cpu"]) == 2
    assert "--device goes with --small" in capsys.readouterr().err
    assert main([*large, "--without-labels", "--small"]) == 2
    assert "--small needs the classes" in capsys.readouterr().err
    assert main(large) == 0
    assert "trained on ImageNet, 3 classes" in capsys.readouterr().err
    assert data_of(tmp_path / "b.onnx") == data_of(out)
    assert main(["encoder", str(tmp_path / "c.onnx"), *large[2:], "--without-labels"]) == 0
    assert "trained on ImageNet, no classes" in capsys.readouterr().err
    assert data_of(tmp_path / "c.onnx") is None, "all images may calibrate"
    others = make_folder(tmp_path / "others", small_images[200:])
    (others / "wide.png").unlink()  # a training file, too
    given = ["calibrate", str(tiny_bundle), str(tmp_path / "out"), "--data", str(others)]
    assert main([*given, "--features", str(out)]) == 0
    assert "features of encoder.onnx: 256" in capsys.readouterr().err
    assert open_bundle(tmp_path / "out").manifest["features"]["source"] == "encoder.onnx"
    assert main([*given, "--features-output", "x"]) == 2
    assert "go with --features" in capsys.readouterr().err
