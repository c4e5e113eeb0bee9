"""Small copies of CIFAR-10 in its published formats."""

import io
import json
import pickle
import tarfile
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image

from ade_cli.data_options import dataset_of
from tests.helpers import encode
from training.data import DataError
from training.datasets import cifar10, load_dataset
from training.datasets.source import classes


def test_a_pickle_that_is_not_an_array_is_refused(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": print}))
    with pytest.raises(DataError, match="must hold arrays only, got builtins.print"):
        load_dataset("cifar10", str(tmp_path))


@pytest.fixture()
def small_cifar10(monkeypatch):
    """A CIFAR-10 of 100 training images, four of them to select and six to calibrate."""
    monkeypatch.setattr(cifar10, "COUNTS", {"train": 100, "test": 20})
    monkeypatch.setattr(cifar10, "TRAIN", 90)
    monkeypatch.setattr(cifar10, "SELECT", 94)


def planes(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def cifar10_files(images, labels, kind="python"):
    """The official batches: five of training images and one of test images."""
    files = {}
    for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        rows, classes = planes(images[20 * i : 20 * i + 20]), labels[20 * i : 20 * i + 20]
        if kind == "python":
            batch = {b"batch_label": b"x", b"labels": classes.tolist(), b"data": rows}
            files[name] = pickle.dumps({**batch, b"filenames": [b"a.png"] * 20}, protocol=2)
        else:
            columns = [classes[:, None].astype(np.uint8), rows]
            files[f"{name}.bin"] = np.concatenate(columns, axis=1).tobytes()
    return files


def write(files, folder):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def archive(path, folder, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    "kind, folder", [("python", "cifar-10-batches-py"), ("binary", "cifar-10-batches-bin")]
)
@pytest.mark.parametrize("packed", [False, True])
def test_official_cifar10(kind, folder, packed, tmp_path, real_images, small_cifar10):
    labels = np.arange(120) % 10
    files = cifar10_files(real_images[:120], labels, kind)
    roots = [tmp_path]
    if packed:
        archive(tmp_path / f"cifar-10-{kind}.tar.gz", folder, files)
        roots.append(tmp_path / f"cifar-10-{kind}.tar.gz")
    else:
        write(files, tmp_path / folder)
        roots.append(tmp_path / folder)
    for root in roots:
        dataset = load_dataset("cifar10", str(root))
        assert np.array_equal(dataset.parts["train"].images, real_images[:90])
        assert np.array_equal(dataset.parts["calibrate"].images, real_images[94:100])
        assert np.array_equal(dataset.parts["test"].images, real_images[100:120])
        assert np.array_equal(dataset.parts["test"].labels, labels[100:])
        assert dataset.splits["select"] == "train[90:94]"


def test_cifar10_as_torchvision_leaves_it(tmp_path, real_images, small_cifar10):
    """The folder and the file names are those that torchvision looks for."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    write(cifar10_files(real_images[:120], np.arange(120) % 10), folder)
    expected = {name for name, _ in CIFAR10.train_list + CIFAR10.test_list}
    assert {path.name for path in folder.iterdir()} == expected
    assert len(load_dataset("cifar10", str(tmp_path)).parts["train"]) == 90


def test_cifar10_strips(tmp_path, real_images, small_cifar10):
    for name, images in (
        ("train_000", real_images[:60]),
        ("train_001", real_images[60:100]),
        ("test_000", real_images[:20]),
    ):
        Image.fromarray(images.reshape(-1, 32, 3)).save(tmp_path / f"{name}.webp", lossless=True)
    np.savez(tmp_path / "labels.npz", train=np.arange(100) % 10, test=np.arange(20) % 10)
    dataset = load_dataset("cifar10", str(tmp_path))
    assert np.array_equal(dataset.parts["train"].images, real_images[:90])
    assert np.array_equal(dataset.parts["calibrate"].labels, np.arange(94, 100) % 10)


@pytest.mark.parametrize(
    "content, message",
    [
        (encode(Image.new("RGB", (32, 64)), "WEBP")[:-9], "cannot be read"),
        (encode(Image.new("RGB", (64, 64)), "WEBP"), "must be 32 pixels wide .* got 64 x 64"),
        (encode(Image.new("RGB", (32, 40)), "WEBP"), "must be .* multiple of 32 high, got 32 x 40"),
    ],
)
def test_damaged_cifar10_strips_are_named(content, message, tmp_path):
    (tmp_path / "train_000.webp").write_bytes(content)
    with pytest.raises(DataError, match=f"train_000.webp {message}"):
        load_dataset("cifar10", str(tmp_path))


@pytest.mark.filterwarnings("ignore:unclosed file")  # NumPy leaves it to the garbage collector
def test_labels_that_are_not_one_number_for_each_image_are_named(tmp_path, real_images):
    strips = real_images[:2].reshape(-1, 32, 3)
    for split in ("train", "test"):
        Image.fromarray(strips).save(tmp_path / f"{split}_0.webp", lossless=True)
    for labels, got in (
        (np.array(1), r"got int64 \(\)"),
        (np.array([0.5, 1.5]), r"got float64 \(2,\)"),
        (np.array(["cat", "dog"]), r"got <U3 \(2,\)"),
    ):
        whole = rf"the labels must be whole numbers \(N,\), {got}"
        np.savez(tmp_path / "labels.npz", train=labels, test=labels)
        with pytest.raises(DataError, match=f"labels.npz must hold .* train: {whole}"):
            load_dataset("cifar10", str(tmp_path))
    for batch in ([None, 1], [[1], [1, 2]]):
        with pytest.raises(DataError, match="data_batch_1: the labels"):
            classes(batch, "data_batch_1")


def test_damaged_cifar10_labels_are_named(tmp_path):
    Image.new("RGB", (32, 64)).save(tmp_path / "train_000.webp")
    labels = tmp_path / "labels.npz"

    def check():
        with pytest.raises(DataError, match=r"labels.npz must hold the array train"):
            load_dataset("cifar10", str(tmp_path))

    np.savez_compressed(labels, train=np.arange(2))
    damaged = bytearray(labels.read_bytes())
    at = damaged.index(b"train.npy") + len(b"train.npy")
    damaged[at + 20 : at + 40] = b"\xff" * 20  # after an extra field
    plain = io.BytesIO()
    np.save(plain, np.arange(2))
    for content in (b"", b"text", b"PK\3\4", bytes(damaged), plain.getvalue()):
        labels.write_bytes(content)
        check()
    for arrays in ({"test": [0, 1]}, {"train": ["cat", "dog"]}):
        np.savez(labels, **arrays)
        check()
    np.savez(labels, train=[0, 1, 2])
    with pytest.raises(DataError, match=r"got 2 images and labels of shape \(3,\)"):
        load_dataset("cifar10", str(tmp_path))


def test_root_alone_says_where_the_data_set_of_a_run_is_now(tmp_path, real_images, small_cifar10):
    write(cifar10_files(real_images[:120], np.zeros(120, int)), tmp_path)
    record = tmp_path / "data.json"
    record.write_text(json.dumps({"data": "cifar10", "root": str(tmp_path / "before")}))
    with pytest.raises(DataError, match="root does not exist: .*before"):
        dataset_of(Namespace(data=None, root=None), tmp_path)
    given = Namespace(data=None, root=str(tmp_path))
    assert len(dataset_of(given, tmp_path).parts["train"]) == 90
    record.write_text(json.dumps({"data": str(tmp_path), "root": None}))
    with pytest.raises(DataError, match="root goes with a named data set"):
        dataset_of(given, tmp_path)


def test_an_incomplete_cifar10_is_refused(tmp_path, real_images):
    write(cifar10_files(real_images[:120], np.zeros(120, int)), tmp_path)
    with pytest.raises(DataError, match="CIFAR-10 has 50000 train images, .* holds 100"):
        load_dataset("cifar10", str(tmp_path))
    (tmp_path / "data_batch_3").write_bytes(b"nothing")
    with pytest.raises(DataError, match="data_batch_3 is not a batch of arrays"):
        load_dataset("cifar10", str(tmp_path))


def test_sizes_that_a_data_set_does_not_have(tmp_path):
    with pytest.raises(DataError, match="images of cifar10 have .. pixels per side"):
        load_dataset("cifar10", str(tmp_path), 64)
