"""Bundles: export, parity, and errors that name what does not match."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ade_base.errors import ConfigError
from ade_base.panel import RELATIVE
from ade_base.system import cpu_session
from ade_cli.main import main
from ade_model.checkpoint import load_model, read_config
from ade_model.config import ModelConfig
from export.copying import copy_bundle
from export.parity import ParityError, check_parity
from export.to_onnx import traced
from export.write import ExportError, export_bundle
from serving.engine.backends import load_backend
from serving.engine.bundle import (
    MANIFEST_NAME,
    WEIGHTS_NAME,
    Bundle,
    BundleError,
    open_bundle,
    plain_name,
    verify_bundle,
    write_manifest,
)
from serving.engine.engine import InferenceEngine
from serving.engine.signatures import OPERATIONS, graphs_of, inputs_of, outputs_of
from serving.page.models import Models
from serving.page.tab_about import card
from tests.helpers import PRETRAINED, ROOT
from training.runs import latest_checkpoint

GRAPH_NAMES = graphs_of(OPERATIONS)


@pytest.fixture()
def copy(tiny_bundle, tmp_path):
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


@pytest.mark.parametrize("bundle", ["tiny", "pretrained"])
def test_an_exported_bundle_is_complete(bundle, tiny_bundle):
    folder = tiny_bundle if bundle == "tiny" else PRETRAINED
    found = verify_bundle(folder)
    assert {f"{g}.onnx" for g in GRAPH_NAMES} | {
        "model.ts",
        "model.safetensors",
        "config.json",
        "calibration.npz",
    } == set(found.manifest["files"]) - {"features.onnx", "encoder.onnx"}
    assert {row["backend"] for row in found.manifest["parity"]} == {"onnxruntime", "torchscript"}
    assert all(row["difference"] <= row["limit"] for row in found.manifest["parity"])
    assert re.fullmatch(r"[\w.-]+@[0-9a-f]{12}", found.model_id)


def test_an_elu_in_other_operators_is_an_elu():
    """ONNX Runtime's own takes twice as long. What is not finite stays so."""
    values = torch.cat(
        [torch.tensor([math.nan, math.inf, -math.inf]), torch.linspace(-90, 90, 999)]
    )
    model = traced(torch.nn.ELU(), {"x": values}, ["y"], None)
    assert "Elu" not in {node.op_type for node in model.graph.node}
    (found,) = cpu_session(model.SerializeToString()).run(["y"], {"x": values.numpy()})
    expected = torch.nn.functional.elu(values.double()).float().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["score.onnx", "model.safetensors", "model.ts", "calibration.npz"])
def test_a_changed_file_is_refused_by_name(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{re.escape(name)} does not match"):
        verify_bundle(copy)
    with pytest.raises(BundleError, match=f"{re.escape(name)} does not match"):
        InferenceEngine(copy, "torchscript" if name == "model.ts" else "onnxruntime", "cpu")
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{re.escape(name)} is missing"):
        verify_bundle(copy)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"format_version": 1},
            "must be 2, got 1: .* another version of this program; export the model again",
        ),
        ({"name": 3}, "name must be a string, got 3"),
        ({"image_shape": None}, "image_shape must be a list, got None"),
        ({"name": "../x"}, "a model's name must start with"),
        ({"name": "my cat"}, "got 'my"),
        ({"files": {"../../etc/passwd": "0"}}, "is not a plain file name"),
        ({"data": {"name": "x", "sketch": ["0", 1]}}, r"data\.sketch\[1\] must be a string, got 1"),
        (
            {"features": {"data": {"sketch": "0"}}},
            r"features\.data\.sketch must be a list, got '0'",
        ),
        ({"files": {}}, r"files must list model\.safetensors"),
        ({"image_shape": [32, 32]}, "image_shape must have 3 values"),
        ({"image_shape": [0, 32, 3]}, "must be positive"),
        ({"latent_shapes": [[1, 2, -3]]}, "must be positive"),
        (
            {"operations": ["score", "pickle", "fly", "swim", "walk"]},  # the first is named
            "operations must be among sample, encode, reconstruct, score, got 'pickle'",
        ),
    ],
)
def test_a_wrong_manifest_is_refused(copy, change, message):
    manifest = json.loads((copy / "manifest.json").read_text()) | change
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


WRONG: list[Any] = [None, True, 7, 1.5, "x", [True], {"x": True}]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_changed_model_is_neither_exported_nor_measured(copy, name, tmp_path, capsys):
    """A new manifest would vouch for it, with the figures of the old model."""
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format_version": 1}))
    assert latest_checkpoint(copy) == copy
    with open(copy / name, "ab") as file:
        file.write(b" ")
    commands = (["export", str(copy), str(tmp_path / "out")], ["evaluate", str(copy)])
    for words in commands:
        assert main(words) == 2
        said = capsys.readouterr().err
        assert f"ade {words[0]}: {copy / name} does not match the manifest: expected" in said
    (copy / "model.safetensors").unlink()
    for words in commands:
        assert main(words) == 2
        assert f"{copy / 'model.safetensors'} is missing: the bundle" in capsys.readouterr().err


def same_type(a, b):
    numbers = (int, float)
    return type(a) is type(b) or isinstance(a, float) and type(b) in numbers


def with_wrong_types(value, path=()):
    """Every key of nested JSON, with each value of another type than it has."""
    if path:
        yield from ((path, wrong) for wrong in WRONG if not same_type(value, wrong))
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from with_wrong_types(item, (*path, key))


def replaced(value, path, new):
    whole = json.loads(json.dumps(value))
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return whole


def test_every_field_of_a_manifest_has_its_type(tmp_path):
    manifest = json.loads((PRETRAINED / "manifest.json").read_text())
    manifest["parity"] = manifest["parity"][:2]
    may_be_null = ("licence", "evaluation", "calibration", "calibration.resized", "features")
    nullable = r"training(\.(started|flow)_from)+|evaluation\.\w+\.figures\.\w+\.value"
    resizes = ("calibration.resize", "calibration.resized.resize")  # a string or null
    tried = 0
    for path, wrong in with_wrong_types(manifest):
        name = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(map(str, path)))
        if (
            (name in may_be_null or re.fullmatch(nullable, name))
            and wrong is None
            or name in resizes
            and wrong in ("x", None)
        ):
            continue
        (tmp_path / "manifest.json").write_text(json.dumps(replaced(manifest, path, wrong)))
        with pytest.raises(BundleError) as raised:
            open_bundle(tmp_path)
        assert name in str(raised.value) and "got " in str(raised.value), (path, wrong)
        tried += 1
    assert tried > 300
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert open_bundle(tmp_path).manifest == manifest


def test_every_field_of_a_configuration_has_its_type(tmp_path):
    """Fields of the model, and those that an export copies to the manifest, are checked.

    Others are kept unchecked.
    """
    config = json.loads((PRETRAINED / "config.json").read_text())
    checked = {"format_version", "recipe", "data", "splits", "seed", "training"}
    checked |= {"images_seen", "model", "operations"}
    for path, wrong in with_wrong_types(config):
        (tmp_path / "config.json").write_text(json.dumps(replaced(config, path, wrong)))
        if path[0] == "model" or len(path) == 1 and path[0] in checked:
            with pytest.raises(
                ConfigError, match=str(next(key for key in path[::-1] if isinstance(key, str)))
            ):
                ModelConfig.from_dict(read_config(tmp_path)["model"])
        else:
            read_config(tmp_path)
    for text in ("[]", "{", "null", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError):
            read_config(tmp_path)


def test_folders_that_are_not_bundles(tmp_path):
    with pytest.raises(BundleError, match="it has no manifest.json$"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match=f"it has no .*; give the one in it, {PRETRAINED}$"):
        open_bundle(PRETRAINED.parent)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="is not JSON"):
        open_bundle(tmp_path)


def test_the_path_of_a_bundle_is_utf_8(tiny_bundle, tmp_path, capsys):
    """ONNX Runtime takes no other; commands on it, or that make it, end before their work."""
    other = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(tiny_bundle, other)
    folder = str(other)
    for command in (
        ["score", "a.png", "--bundle", folder],
        ["serve", folder],
        ["calibrate", str(tiny_bundle), f"{folder}2", "--data", str(tmp_path)],
        ["fit", str(tiny_bundle), "--out", f"{folder}3"],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "the path of a bundle must be UTF-8, got" in error and r"caf\udce9" in error


@pytest.mark.parametrize("bundle", ["tiny", "pretrained"])
def test_weights_are_stored_once_per_format(bundle, tiny_bundle):
    folder = tiny_bundle if bundle == "tiny" else PRETRAINED
    for graph in GRAPH_NAMES:
        model = onnx.load(str(folder / f"{graph}.onnx"), load_external_data=False)
        inline = [
            t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL
        ]
        assert sum(len(t.raw_data) for t in inline) < 60_000, graph
        external = [
            t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL
        ]
        assert external
        assert {e.value for t in external for e in t.external_data if e.key == "location"} == {
            "model.safetensors"
        }
        if bundle == "pretrained":  # and those that the checkpoint has in half precision, as such
            assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in external) == (
                not graph.startswith("flow")
            )


@pytest.mark.parametrize("bundle", ["tiny", "pretrained"])
def test_no_file_reveals_the_machine_that_wrote_it(bundle, tiny_bundle):
    folder = tiny_bundle if bundle == "tiny" else PRETRAINED
    here = [str(ROOT), sys.prefix, "site-packages", "/home/", "/root/", "/usr/lib/"]
    for path in folder.iterdir():
        data = path.read_bytes()
        assert not [word for word in here if word.encode() in data], path.name
    for graph in GRAPH_NAMES:
        model = onnx.load(str(folder / f"{graph}.onnx"), load_external_data=False)
        assert not model.doc_string and not any(
            n.doc_string or n.metadata_props for n in model.graph.node
        )


def test_a_client_of_the_bare_onnx_file_gets_the_same_answer(tiny_bundle, small_images):
    """Needs only ONNX Runtime: pixels in, pixels and bits out."""
    script = (
        "import sys, numpy as np, onnxruntime as ort\n"
        f"session = ort.InferenceSession({str(tiny_bundle / 'score.onnx')!r})\n"
        "inputs = dict(np.load(sys.argv[1]))\n"
        "np.save(sys.argv[2], session.run(None, inputs)[0])\n"
    )
    engine = InferenceEngine(tiny_bundle, device="cpu")
    names = inputs_of("score", 2)
    from export.parity import make_inputs

    inputs = make_inputs(small_images[:5], engine.latent_shapes, names)
    source, target = tiny_bundle.parent / "in.npz", tiny_bundle.parent / "out.npy"
    np.savez(source, **inputs)
    subprocess.run(
        [sys.executable, "-c", script, str(source), str(target)], check=True, cwd=tiny_bundle.parent
    )
    ours = engine.backend.run("score", inputs)[outputs_of("score", 2)[0]]
    assert np.allclose(np.load(target), ours, atol=1e-5)


@pytest.mark.usefixtures("traced_before")
def test_failing_parity_writes_nothing_and_says_what_differs(
    tiny_checkpoint, small_images, tmp_path, monkeypatch
):
    monkeypatch.setattr("export.parity.MAX_BPD", 1e-12)
    with pytest.raises(
        ParityError, match=r"output \w+ of \w+ differs from eager float64 by .* bits per dimension"
    ):
        export_bundle(tiny_checkpoint, tmp_path / "out", "tiny", small_images[:40], None)
    assert list(tmp_path.iterdir()) == []


def test_parity_sees_a_wrong_weight(tiny_bundle, tiny_checkpoint, small_images):
    import torch

    engine = InferenceEngine(tiny_bundle, device="cpu")
    model = load_model(tiny_checkpoint)
    with torch.no_grad():
        model.decoder.to_mean[1].bias[0] += 0.01
    from serving.engine.backends import load_backend

    backend = load_backend(engine.bundle, GRAPH_NAMES, "onnxruntime", "cpu")
    with pytest.raises(ParityError):
        check_parity(model, {"onnxruntime": backend}, small_images[:40])


@pytest.mark.parametrize("fault, message", [("nan", "by nan"), ("place", "relative, of a pixel")])
def test_parity_checks_each_batch_and_each_pixel(
    fault, message, tiny_bundle, tiny_checkpoint, small_images
):
    backend = InferenceEngine(tiny_bundle, device="cpu").backend

    class Faulty:
        name, fixed_sizes = backend.name, backend.fixed_sizes

        def run(self, graph, inputs, *rest):
            found = dict(backend.run(graph, inputs, *rest))
            if fault == "nan" and graph == "encode" and len(inputs["images"]) == 1:
                found = {name: np.full_like(value, np.nan) for name, value in found.items()}
            if fault == "place" and "cost" in found:
                found["cost"] = found["cost"].swapaxes(2, 3)  # the sums are the same
            return found

    with pytest.raises(ParityError, match=message):
        check_parity(load_model(tiny_checkpoint), {"faulty": Faulty()}, small_images[:40])


@pytest.mark.parametrize("num_wrong, passes", [(8, True), (14, False)])
def test_parity_allows_one_value_of_ten_thousand_in_small_models_too(
    num_wrong, passes, tiny_bundle, tiny_checkpoint, small_images
):
    """The tiny model has 192 values per image: 64 images alone would allow one wrong value."""
    model, bundle = load_model(tiny_checkpoint), open_bundle(tiny_bundle)
    backend = load_backend(bundle, graphs_of(OPERATIONS), "onnxruntime", "cpu")
    num_values, noise = 0, set()

    class Faulty:
        name, fixed_sizes = backend.name, backend.fixed_sizes

        def run(self, graph, inputs, *rest):
            nonlocal num_values
            found = dict(backend.run(graph, inputs, *rest))
            if graph == "sample":
                images = found["images"].copy()
                if not num_values:
                    images.reshape(-1)[:num_wrong] ^= 1
                num_values += images.size
                noise.update(row.tobytes() for row in inputs["y_eps"])
                found["images"] = images
            return found

    rows = []
    try:
        rows = check_parity(model, {"faulty": Faulty()}, small_images[:40])
    except ParityError as error:
        assert "output images of sample" in str(error)
    assert bool(rows) == passes
    assert num_values >= 100_000 and len(noise) >= 100_000 / 192 - 8
    if passes:
        (row,) = (row for row in rows if (row.graph, row.output) == ("sample", "images"))
        assert row.limit == 1e-4 and row.difference >= num_wrong / num_values


def test_a_verdict_of_another_version_is_replaced(copy, small_images, tmp_path):
    from ade_base.files import sha256_of
    from export.gate.calibrate import calibrate_bundle

    (copy / "calibration.npz").write_bytes(b"of another version")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["calibration.npz"] = sha256_of(copy / "calibration.npz")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / "features.onnx").write_bytes(b"not listed")
    for path in copy.iterdir():
        path.chmod(0o444)
    calibrate_bundle(copy, tmp_path / "new", small_images[:150], small_images[150:], "corners")
    assert InferenceEngine(tmp_path / "new", device="cpu").calibration is not None
    assert (tmp_path / "new" / "calibration.npz").stat().st_mode & stat.S_IWUSR
    assert not verify_bundle(tmp_path / "new").has("features.onnx")


def test_a_copy_is_what_the_manifest_says(copy, tmp_path):
    """A copy gets a new manifest, which must not vouch for what the old one does not list."""
    bundle = verify_bundle(copy)
    (copy / "features.onnx").write_bytes(b"not listed")

    def copied(name):
        (tmp_path / name).mkdir()
        copy_bundle(bundle, tmp_path / name)
        return tmp_path / name

    found = {str(path.relative_to(tmp_path / "a")) for path in copied("a").rglob("*.*")}
    assert found == {*bundle.manifest["files"], "manifest.json"}
    whole = (copy / "config.json").read_bytes()
    (copy / "config.json").write_bytes(whole + b" ")
    with pytest.raises(BundleError, match=r"config\.json does not match the manifest"):
        copied("b")
    (copy / "config.json").unlink()
    with pytest.raises(BundleError, match=r"config\.json is missing"):
        copied("c")
    write_manifest(copy, bundle.manifest)  # another bundle, whole by itself
    with pytest.raises(BundleError, match="was replaced while it was copied"):
        copied("d")


def test_training_data_without_a_sketch_is_recognised_by_name_and_split(tiny_bundle):
    from export.gate.split import trained_on

    said: list[str] = []

    def found(name, its, data, splits):
        manifest = open_bundle(tiny_bundle).manifest
        bundle = Bundle(tiny_bundle, {**manifest, "data": {"name": data, "splits": splits}})
        return trained_on(bundle, name, its, {"name": "things", "splits": splits}, said.append)

    by_name = {"train": "Photos: 80 files by hash of the file name"}
    by_index = {"train": "train[0:45000]"}
    by_its_name = "was trained on {} (recognised by its name)"
    assert found("Photos", None, "Photos", by_name) == f"model {by_its_name.format('Photos')}"
    assert found("cifar10", by_index, "cifar10", by_index) == "model was trained on cifar10"
    network = "network of features"
    assert found("things", None, "Photos", by_name) == f"{network} {by_its_name.format('things')}"
    assert found("photos", None, "Photos", by_name) == "" and not said
    # A folder of that name exists.
    assert found("cifar10", None, "cifar10", by_index) == ""
    assert "with another split" in said[0]
    assert found("cifar10", by_index, "cifar10", by_name) == ""
    more = {"train": "Photos: 81 files by hash of the file name"}
    assert found("lsun", more, "lsun", by_name) == "model was trained on lsun"


def write_archives(folder, store):
    from handlers.service.options import ServingOptions
    from handlers.service.worker import WorkerSettings
    from handlers.torchserve.archives import write_archive

    bundle = open_bundle(folder)
    for operation in OPERATIONS:
        settings = WorkerSettings(
            *(str(folder), bundle.model_id, bundle.digest, operation, operation),
            *(f"{operation}-0", "logs", ServingOptions(device="cpu")),
        )
        write_archive(settings, store, 1)


def test_archives_leave_other_temporary_files_alone(tiny_bundle, tmp_path, monkeypatch):
    import tempfile

    mine = tmp_path / "temporary" / "score" / "results.csv"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "store").mkdir()
    write_archives(tiny_bundle, tmp_path / "store")
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == sorted(
        f"{name}.mar" for name in OPERATIONS
    )
    assert mine.read_text() == "mine" and list((tmp_path / "temporary").iterdir()) == [mine.parent]


def test_archives_of_a_bundle_in_a_folder_of_any_name(tiny_bundle, tmp_path):

    bundle = open_bundle(Path(shutil.copytree(tiny_bundle, tmp_path / "photos, 2026 [*]")))
    os.utime(bundle.folder / MANIFEST_NAME, (0, 0))  # as a reproducible archive may set it
    (tmp_path / "store").mkdir()
    write_archives(bundle.folder, tmp_path / "store")
    for operation in OPERATIONS:
        with zipfile.ZipFile(tmp_path / "store" / f"{operation}.mar") as archive:
            found = {Path(name).name for name in archive.namelist()}
            (text,) = (archive.read(n) for n in archive.namelist() if n.endswith(".yaml"))
        config = yaml.safe_load(text)
        assert 300 < config["maxRetryTimeoutInSec"] < 2**31 / 1000
        assert config["ade"]["operation"] == operation
        assert ("calibration.npz" in found) == (operation == "score")
        expected = {MANIFEST_NAME, WEIGHTS_NAME, *(f"{g}.onnx" for g in bundle.graphs([operation]))}
        assert expected < found


@pytest.mark.usefixtures("traced_before")
def test_a_model_has_the_licence_that_its_owner_states(
    tiny_bundle, tiny_checkpoint, small_images, tmp_path
):
    assert open_bundle(tiny_bundle).manifest["licence"] is None
    served = Models("http://127.0.0.1:1", [open_bundle(tiny_bundle)], None)
    assert "Licence not stated" in card(served, "tiny")
    export_bundle(
        tiny_checkpoint, tmp_path / "out", "tiny", small_images[:40], None, licence="CC0-1.0"
    )
    assert open_bundle(tmp_path / "out").manifest["licence"] == "CC0-1.0"


def test_the_page_names_the_images_that_a_gate_was_calibrated_on(tmp_path):
    bundle = open_bundle(PRETRAINED)
    calibration = {**bundle.manifest["calibration"], "data": "<scans>"}
    folder = Path(shutil.copytree(PRETRAINED, tmp_path / "other", copy_function=os.symlink))
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, {**bundle.manifest, "calibration": calibration})
    other = open_bundle(folder)
    for calibrated, name in ((bundle, "CIFAR-10"), (other, "&lt;scans&gt;")):
        served = Models("http://127.0.0.1:1", [calibrated], None)
        shown = card(served, calibrated.name)
        assert f"unlike those of {name}." in shown and f"of {name} calibrated the" in shown
        assert "<p>CIFAR-10, " in shown, "it was trained on them"


def test_the_card_shows_what_is_known_of_a_model():
    """The panel of figures, its recipe and what guided it."""
    bundle = open_bundle(PRETRAINED)
    shown = card(Models("http://127.0.0.1:1", [bundle], None), bundle.name)
    assert "<b>14.1</b><span>excess Fréchet distance, EfficientNet-Lite2" in shown
    assert RELATIVE in shown and "part test" in shown
    assert "saw images through EfficientNet-Lite0" in shown and "Guides drew its samples" in shown
    selected = {"select": bundle.manifest["evaluation"]["test"]}
    training = {"images_seen": 1, "seed": 0, "started_from": None}
    changed = {"recipe": "flow-gan-h", "evaluation": selected, "training": training}
    other = Bundle(bundle.folder, {**bundle.manifest, **changed})
    shown = card(Models("http://127.0.0.1:1", [other], None), bundle.name)
    assert "of the recipe flow-gan-h" in shown and "part select" in shown
    assert "Guides" not in shown
    figures = {"psnr": {"value": None, "note": "exact", "images": 9}}
    exact = Bundle(bundle.folder, {**bundle.manifest, "evaluation": {"test": {"figures": figures}}})
    shown = card(Models("http://127.0.0.1:1", [exact], None), exact.name)
    assert "PSNR" not in shown, "an exact reconstruction has none"


def test_export_refuses_an_existing_folder(tiny_checkpoint, small_images, tmp_path):
    with pytest.raises(ExportError, match="exists: export to a new folder"):
        export_bundle(tiny_checkpoint, tmp_path, "tiny", small_images, None)
    with pytest.raises(ExportError, match="images must be \\(N, "):
        export_bundle(tiny_checkpoint, tmp_path / "new", "tiny", small_images[:, :4], None)


def test_another_lossless_coder_gives_a_warning(capsys):
    from handlers.launch.serve import _warn_of_another_coder

    bundle = open_bundle(PRETRAINED)
    _warn_of_another_coder(Bundle(bundle.folder, {**bundle.manifest, "calibration": None}))
    assert capsys.readouterr().err == ""
    _warn_of_another_coder(
        Bundle(bundle.folder, {**bundle.manifest, "calibration": {"webp": "0.1"}})
    )
    assert f"{bundle.name} was calibrated with libwebp 0.1" in capsys.readouterr().err


@pytest.mark.usefixtures("traced_before")
def test_weights_that_half_precision_would_change_are_stored_as_they_are(
    tiny_checkpoint, small_images, tmp_path, monkeypatch
):
    def bits_of(out):
        export_bundle(tiny_checkpoint, out, "m", small_images[:40], None, told.append)
        return {value.dtype for value in load_file(out / WEIGHTS_NAME).values()}

    told: list[str] = []
    # The graphs taken are of weights in single precision, so they are not loaded.
    monkeypatch.setattr("export.write.load_backend", lambda *_: None)
    monkeypatch.setattr("export.write.check_parity", lambda *_: [])
    monkeypatch.setattr("ade_model.checkpoint.MIN_HALF", 16)
    assert torch.float16 in bits_of(tmp_path / "half")
    monkeypatch.setattr("export.write.MAX_BPD", 0.0)
    assert torch.float16 not in bits_of(tmp_path / "single")
    assert "half precision changes likelihoods" in "".join(told)


@pytest.mark.parametrize(
    "folder, name", [("My Photos_2", "my-photos-2"), ("Köln (neu)", "k-ln-neu"), ("äö", "images")]
)
def test_a_folder_names_a_model(folder, name):
    assert plain_name(folder) == name
