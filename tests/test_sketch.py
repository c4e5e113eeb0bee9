"""Training files are recognised by their content, whatever their folder is called."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from torch import nn

from ade_base.pictures.show import write_png
from ade_model.checkpoint import read_config
from export.feature_source import DATA_KEY
from export.features import data_of
from export.gate.split import choose_files, files_that_test, trained_on
from export.to_onnx import export_encoder
from export.write import export_bundle
from serving.engine.bundle import Bundle, open_bundle
from tests.helpers import narrow
from training.data import DataError
from training.datasets.files import part_of
from training.datasets.folder import load_folder
from training.datasets.sketch import SIZE, VERSION, record_of, version_of
from training.loop import _sketch_of, train
from training.run_options import RunOptions
from training.runs import latest_checkpoint

COUNT = 400


def write_images(folder, seed, count=COUNT):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        image = rng.integers(0, 256, (2, 2, 3), np.uint8)
        (folder / f"{i}.png").write_bytes(write_png(image))
    return folder


def loaded(folder):
    return load_folder(folder, None, None, lambda line: None)


@pytest.fixture(autouse=True)
def a_few_suffice(monkeypatch):
    monkeypatch.setattr("export.gate.split.MIN_IMAGES", 1)


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", 0)


@pytest.fixture
def record(photos):
    return record_of(loaded(photos))


def bundle_of(record, ancestor=None):
    training = {"images_seen": 1, "started_from": ancestor}
    return Bundle(Path(), {"name": "it", "data": record, "training": training})


def names_of(files):
    return {path.name for path in files}


def names_in(part, count=COUNT):
    return {name for i in range(count) if part_of(name := f"{i}.png") == part}


def hash_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def test_a_sketch_holds_the_smallest_hashes_and_no_paths(photos, record):
    trained = [path for path in photos.iterdir() if part_of(path.name) == "train"]
    hashes = sorted(map(hash_of, trained))
    assert len(trained) > SIZE and record["sketch"] == hashes[:SIZE]
    assert set(record) == {"name", "splits", "sketch"} and str(photos) not in json.dumps(record)
    for path in trained[:300]:
        path.unlink()
    assert record_of(loaded(photos))["sketch"] == sorted(map(hash_of, trained[300:]))
    named = dataclasses.replace(loaded(photos), folder=None)
    assert record_of(named) == {"name": "photos", "splits": named.splits}


@pytest.mark.parametrize("where", ["copy", "parent", "subfolder", "with the same name"])
@pytest.mark.parametrize("network", ["model", "network of features"])
def test_training_files_are_recognised_in_any_folder(tmp_path, photos, record, where, network):
    """Then only held-out files calibrate and test, as of the folder itself."""
    if where == "parent":
        write_images(tmp_path / "new" / "more", 1)
        shutil.move(photos, tmp_path / "new")
    elif where == "subfolder":
        (tmp_path / "new").mkdir()
        for path in sorted(photos.iterdir())[:100]:
            path.rename(tmp_path / "new" / path.name)
    else:
        shutil.copytree(photos, tmp_path / "new")
    folder = tmp_path / "new"
    if where == "with the same name":
        folder = folder.rename(tmp_path / "elsewhere")
    elsewhere = {"name": "other", "splits": {}}
    bundle = bundle_of(record if network == "model" else elsewhere)
    features = record if network != "model" else None
    said: list[str] = []
    chosen = choose_files(folder, bundle, features, said.append)
    assert f"the {network} was trained on files of {folder.name} (recog" in said[-1]
    assert "only its parts select and calibrate are used" in said[-1]
    assert names_of(chosen.fit) <= names_in("select")
    assert names_of(chosen.calibrate) <= names_in("calibrate") and chosen.calibrate
    assert names_of(chosen.trained) <= names_in("train") and chosen.trained
    bundle.manifest["features"] = {"data": features}
    tests = files_that_test(folder, bundle, None, said.append)
    assert tests is not None and "only its part test is used" in said[-1]
    is_test, trained = tests
    assert names_of(trained) == names_of(chosen.trained)
    its = {path.name for path in folder.rglob("*.png") if is_test(path)}
    assert its == names_of(chosen.unseen) and its <= names_in("test")


def test_a_few_training_files_among_others_are_recognised(tmp_path, photos, record):
    """A share of the training files that is unlikely to miss all of the sketched ones."""
    mixed = write_images(tmp_path / "mixed", 1)
    trained = sorted(names_in("train"))[:20]
    for name in trained:
        shutil.copy(photos / name, mixed / name)
    chosen = choose_files(mixed, bundle_of(record), None, print)
    assert not names_of([*chosen.fit, *chosen.calibrate, *chosen.unseen]) & set(trained)


def test_another_folder_of_the_same_name_counts_as_new(tmp_path, record):
    other = write_images(tmp_path / "elsewhere" / "photos", 1)
    said: list[str] = []
    chosen = choose_files(other, bundle_of(record), None, said.append)
    assert len(chosen.fit) + len(chosen.calibrate) + len(chosen.unseen) == COUNT
    assert not chosen.trained
    assert any("of the same name, photos, but none of 256 of its files is" in s for s in said)
    assert files_that_test(other, bundle_of(record), None, said.append) is None


def test_held_out_files_alone_can_all_be_used(photos, record):
    for name in names_in("train"):
        (photos / name).unlink()
    chosen = choose_files(photos, bundle_of(record), None, print)
    used = [*chosen.fit, *chosen.calibrate, *chosen.unseen]
    assert names_of(used) == names_in("select") | names_in("calibrate") | names_in("test")


def test_renamed_training_files_are_refused(photos, record):
    """Their names no longer tell which of them were held out; copies under both names do."""
    trained = next(p for p in photos.iterdir() if hash_of(p) in record["sketch"])
    held_out = next(
        name for i in range(1000) if part_of(name := f"copy-{i}.png") in ("calibrate", "test")
    )
    shutil.copy(trained, photos / held_out)
    assert choose_files(photos, bundle_of(record), None, print).trained
    trained.unlink()
    message = f"the model was trained on .*{held_out} under another name.*give images that"
    with pytest.raises(DataError, match=message):
        choose_files(photos, bundle_of(record), None, print)
    for path in sorted(photos.iterdir()):
        path.rename(path.with_name(f"renamed-{path.name}"))
    with pytest.raises(DataError, match=r"and at least \d+ other files under another name"):
        files_that_test(photos, bundle_of(record), None, print)


@pytest.mark.parametrize("sketch", [None, "0" * 16, [], ["x"], [7], {"0" * 16: 1}, ["0" * 15]])
def test_without_a_usable_sketch_the_name_decides(tmp_path, photos, record, sketch):
    """Bundles of older versions have none; a damaged one would match no file."""
    record = {**record, "sketch": sketch}
    if sketch is None:
        del record["sketch"]
    said: list[str] = []
    chosen = choose_files(photos, bundle_of(record), None, said.append)
    assert chosen.trained and "trained on photos (recognised by its name): only" in said[-1]
    photos.rename(tmp_path / "renamed")
    assert not choose_files(tmp_path / "renamed", bundle_of(record), None, print).trained


@pytest.mark.parametrize("taken", ["started_from", "flow_from"])
def test_the_data_of_earlier_models_are_recognised(tmp_path, photos, record, taken):
    """A model that was trained further on other images has seen those of before, too."""
    now = record_of(loaded(write_images(tmp_path / "later", 1)))
    before = {**record, "data": record["name"], "recipe": "v-ade", "started_from": None}
    del before["name"]
    bundle = bundle_of(now, {"recipe": "v-ade", "images_seen": 1, taken: before})
    said: list[str] = []
    chosen = choose_files(photos, bundle, None, said.append)
    assert "the model was trained on files of photos (recognised by the content" in said[-1]
    assert names_of(chosen.trained) == names_in("train")
    assert names_of([*chosen.fit, *chosen.calibrate]) == names_in("select") | names_in("calibrate")
    assert choose_files(tmp_path / "later", bundle, None, print).trained
    del before["sketch"]  # as of a run of an earlier version
    assert choose_files(photos, bundle, None, print).trained
    photos.rename(tmp_path / "renamed")
    assert not choose_files(tmp_path / "renamed", bundle, None, print).trained


def test_an_earlier_stage_on_the_same_data_is_known_by_their_sketch(tmp_path, record):
    """A run of an earlier version has no sketch, and its folder's name alone would mislead."""
    before = {"data": record["name"], "splits": record["splits"], "started_from": None}
    others = write_images(tmp_path / "others" / "photos", 2)
    said: list[str] = []
    assert not choose_files(others, bundle_of(record, before), None, said.append).trained
    assert any("a data set of the same name, photos, but none of" in line for line in said)


def test_a_named_data_set_is_recognised_by_its_training_part():
    """The other parts may be divided otherwise, as STL-10's were in earlier versions."""
    said: list[str] = []
    parts = {"train": "unlabeled[0:90000]", "test": "test[0:8000]"}
    bundle = bundle_of({"name": "stl10", "splits": parts})

    def found(**splits):
        return trained_on(bundle, "stl10", splits, None, said.append)

    now = found(train=parts["train"], calibrate="test[0:3000]", test="test[3000:8000]")
    assert now == "model was trained on stl10" and not said
    # Labelled images are others, and slices of the unlabelled ones may hold the same.
    assert found(train="train[0:4500]", test=parts["test"]) == "" and "another split" in said[0]
    with pytest.raises(DataError, match=r"on unlabeled\[0:90000\] .* is unlabeled\[0:80000\] now"):
        found(train="unlabeled[0:80000]", test=parts["test"])


def test_training_files_that_were_moved_before_a_run_resumes_are_recognised(tmp_path, photos):
    """A run keeps a sketch of the files from its start."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    options = RunOptions(images=16, device="cpu", precision="float32")
    train(narrow("vae"), load_folder(photos, 8, None, print), run, options, resume=False)
    moved.mkdir()
    for i in range(COUNT // 2):
        (photos / f"{i}.png").rename(moved / f"{i}.png")
    rest = load_folder(photos, 8, None, print)
    train(narrow("vae"), rest, run, dataclasses.replace(options, images=32), resume=True)
    about = read_config(latest_checkpoint(run))
    record = {"name": about["data"], "splits": about["splits"], "sketch": about["sketch"]}
    chosen = choose_files(moved, bundle_of(record), None, print)
    assert names_of(chosen.trained) == names_in("train", COUNT // 2)
    assert choose_files(photos, bundle_of(record), None, print).trained


def test_training_files_are_hashed_once(tmp_path, photos, monkeypatch):
    """Not by later runs of a process, nor by a run that resumes on the same files."""
    run, later = tmp_path / "run", tmp_path / "later"
    options = RunOptions(images=16, device="cpu", precision="float32")
    dataset = load_folder(photos, 8, None, print)
    train(narrow("vae"), dataset, run, options, resume=False)
    monkeypatch.delattr("training.datasets.sketch.read_again")
    train(narrow("vae"), dataset, later, options, resume=False)
    again, options = load_folder(photos, 8, None, print), dataclasses.replace(options, images=32)
    train(narrow("vae"), again, run, options, resume=True)
    sketch = record_of(dataset)["sketch"]
    assert len(sketch) == SIZE
    assert all(read_config(latest_checkpoint(its))["sketch"] == sketch for its in (run, later))


def test_a_sketch_lacks_no_file(tmp_path, photos, record, monkeypatch):
    """Without the disk, training files would not be recognised later."""
    dataset = loaded(photos)
    photos.rename(tmp_path / "unplugged")
    with pytest.raises(DataError, match="read before and cannot be read now: No such file"):
        record_of(dataset)
    (tmp_path / "unplugged").rename(photos)
    assert record_of(dataset) == record

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("training.datasets.sketch.read_file", fail)
    with pytest.raises(DataError, match="400 of 400 files cannot be read now"):
        choose_files(photos, bundle_of(record), None, print)


def test_files_that_are_replaced_under_their_names_join_the_sketch(tmp_path, photos):
    options = RunOptions(images=16, device="cpu", precision="float32")
    before = load_folder(photos, 8, None, print)
    train(narrow("vae"), before, tmp_path / "run", options, resume=False)
    for path in photos.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    after = load_folder(photos, 8, None, print)
    assert after.splits == before.splits
    options = dataclasses.replace(options, images=32)
    train(narrow("vae"), after, tmp_path / "run", options, resume=True)
    about = read_config(latest_checkpoint(tmp_path / "run"))
    sketch, hashes = about["sketch"], [set(record_of(data)["sketch"]) for data in (before, after)]
    assert sketch == sorted(hashes[0] | hashes[1])[:SIZE] and set(sketch) & hashes[1]
    for path in photos.rglob("*.png"):
        os.utime(path, (0, 0))  # as on another node, which must get the same sketch
    again = load_folder(photos, 8, None, print)
    assert version_of(again) != about[VERSION] and _sketch_of(again, about) == sketch


class Means(nn.Module):
    def forward(self, images):
        return images.float().mean((1, 2))


def test_an_encoder_file_has_the_sketch(photos, record):
    path = photos.parent / "net.onnx"
    images = np.zeros((2, 4, 4, 3), np.uint8)
    export_encoder(Means(), images, ["features"], path, record)
    assert data_of(path) == record
    model = onnx.load(str(path))
    for value, expected in [
        (json.dumps({**record, "sketch": ["x"]}), {k: record[k] for k in ("name", "splits")}),
        (json.dumps({**record, "name": 7}), None),
        ('["sketch"]', None),
        ("[" * 100_000, None),
        ("{", None),
    ]:
        onnx.helper.set_model_props(model, {DATA_KEY: value})
        onnx.save(model, str(path))
        assert data_of(path) == expected


@pytest.mark.usefixtures("traced_before")
def test_a_bundle_has_the_sketch_of_the_data_that_it_was_trained_on(
    tiny_checkpoint, small_images, tmp_path, photos
):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    dataset = loaded(photos)
    config = json.loads((checkpoint / "config.json").read_text())
    config.update(data="photos", splits=dataset.splits)
    (checkpoint / "config.json").write_text(json.dumps(config))
    said: list[str] = []
    for name in ("same", "other", "kept"):
        if name == "other":
            (photos / "0.png").unlink()
            dataset = loaded(photos)
        if name == "kept":  # as training keeps it
            (checkpoint / "config.json").write_text(json.dumps({**config, "sketch": ["0" * 16]}))
        out = tmp_path / name
        export_bundle(checkpoint, out, "it", small_images[:40], None, said.append, dataset=dataset)
        found = open_bundle(out).manifest["data"]
        assert found["name"] == "photos" and ("sketch" in found) == (name != "other")
        # From which further training takes it.
        assert read_config(out).get("sketch") == found.get("sketch")
    assert found["sketch"] == ["0" * 16]
    assert sum("no sketch of the training files" in line for line in said) == 1
