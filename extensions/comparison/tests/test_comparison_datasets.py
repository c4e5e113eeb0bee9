"""Small copies of STL-10, ImageNet 64x64 and LSUN in their formats."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import ROOT
from tests.test_cifar10 import archive, planes
from training.data import DataError
from training.datasets import image_size_of, load_dataset


def test_stl10_from_its_binary_files(tmp_path: Path, real_images: np.ndarray) -> None:
    """Stored channel by channel and column by column, as the original is."""
    large = real_images[:30].repeat(3, axis=1).repeat(3, axis=2)
    stored = large.transpose(0, 3, 2, 1)
    files = {
        "unlabeled_X.bin": stored[:20].tobytes(),
        "test_X.bin": stored[20:].tobytes(),
        "test_y.bin": (np.arange(10, dtype=np.uint8) % 10 + 1).tobytes(),
    }
    archive(tmp_path / "stl10_binary.tar.gz", "stl10_binary", files)
    whole = load_dataset("stl10", str(tmp_path), 96)
    assert np.array_equal(
        np.concatenate([whole.parts[p].images for p in ("train", "select")]), large[:19]
    )
    # Those that calibrate and those that test are of one population.
    assert np.array_equal(
        np.concatenate([whole.parts[p].images for p in ("calibrate", "test")]), large[20:]
    )
    assert (whole.splits["calibrate"], whole.splits["test"]) == ("test[0:4]", "test[4:10]")
    assert whole.parts["test"].labels.tolist() == list(range(4, 10))
    dataset = load_dataset("stl10", str(tmp_path))
    assert whole.parts["train"].labels is None
    assert dataset.image_size == 48 and whole.splits["train"] == "unlabeled[0:18]"
    assert abs(dataset.parts["train"].images.mean() - large[:18].mean()) < 1
    (tmp_path / "stl10_binary").mkdir()
    (tmp_path / "stl10_binary" / "test_X.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="test_X.bin must be a multiple of 27648 bytes, got 5"):
        load_dataset("stl10", str(tmp_path))


def test_stl10_without_its_unlabelled_images_has_labels(
    tmp_path: Path, real_images: np.ndarray
) -> None:
    large = real_images[:30].repeat(3, axis=1).repeat(3, axis=2).transpose(0, 3, 2, 1)
    for name, rows in (("train", large[:20]), ("test", large[20:])):
        (tmp_path / f"{name}_X.bin").write_bytes(rows.tobytes())
        classes = np.arange(len(rows), dtype=np.uint8) % 10 + 1
        (tmp_path / f"{name}_y.bin").write_bytes(classes.tobytes())
    dataset = load_dataset("stl10", str(tmp_path), 96)
    parts = dataset.parts
    assert dataset.splits["test"] == "test[0:10]"
    assert parts["train"].labels.tolist() == [*range(10), *range(8)]
    assert parts["calibrate"].labels.tolist() == [9]
    (tmp_path / "train_y.bin").unlink()
    assert load_dataset("stl10", str(tmp_path), 96).splits == dataset.splits


@pytest.mark.parametrize("kind", ["npz", "pickle"])
def test_imagenet64_from_its_batches(kind: str, tmp_path: Path, real_images: np.ndarray) -> None:
    images = real_images[:50].repeat(2, axis=1).repeat(2, axis=2)
    for name, rows in (
        ("train_data_batch_2", images[20:40]),
        ("train_data_batch_1", images[:20]),
        ("val_data", images[40:]),
    ):
        values = {"data": planes(rows), "labels": np.arange(1, len(rows) + 1), "mean": np.zeros(3)}
        if kind == "npz":
            np.savez(tmp_path / f"{name}.npz", **values)
        else:
            (tmp_path / name).write_bytes(
                pickle.dumps({**values, "labels": values["labels"].tolist()})
            )
    if kind == "npz":  # the other form of a batch, too: it is the same images, and counts once
        (tmp_path / "train_data_batch_1").write_bytes(
            pickle.dumps({"data": planes(images[:20]), "labels": [1] * 20})
        )
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        said: list[str] = []
        dataset = load_dataset("imagenet64", str(tmp_path), None, cache, said.append)
        assert any("lacks train_data_batch_3, train_data_batch_4," in line for line in said)
        trained = np.concatenate(
            [np.asarray(dataset.parts[p].images) for p in ("train", "select", "calibrate")]
        )
        assert np.array_equal(trained, images[:40])
        assert (
            np.array_equal(dataset.parts["test"].images, images[40:])
            and dataset.splits["test"] == "val[0:10]"
        )
        assert dataset.parts["test"].labels.tolist() == list(range(10))
        labels = [dataset.parts[p].labels for p in ("train", "select", "calibrate")]
        assert np.concatenate(labels).tolist() == 2 * list(range(20))
    (tmp_path / ("val_data.npz" if kind == "npz" else "val_data")).write_bytes(b"PK nothing")
    with pytest.raises(DataError, match="val_data"):
        load_dataset("imagenet64", str(tmp_path))


def make_lmdb(root: Path, images: np.ndarray) -> Path:
    """Write an LMDB like LSUN's, with one value that is not an image."""
    lmdb = pytest.importorskip("lmdb")
    with (
        lmdb.open(str(root), map_size=2**24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for i, image in enumerate(images):
            out = io.BytesIO()
            Image.fromarray(image).save(out, "WEBP", lossless=True)
            transaction.put(f"{i:040x}".encode(), out.getvalue())
        transaction.put(b"f" * 40, b"no image")
    return root


def test_a_truncated_lmdb_is_refused(tmp_path: Path, real_images: np.ndarray) -> None:
    """Runs in a separate process, because reading beyond the end would kill it (SIGBUS)."""
    data = make_lmdb(tmp_path / "tower_train_lmdb", real_images[:60]) / "data.mdb"
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom training.data import DataError\n"
        "from training.datasets import image_size_of, load_dataset\n"
        "data = Path(sys.argv[1])\nwhole = data.read_bytes()\n"
        "assert load_dataset('lsun', str(data.parent), 8)\n"
        "for i in range(60):\n"
        "    data.write_bytes(whole[:len(whole) * i // 60])\n"
        "    try:\n        load_dataset('lsun', str(data.parent), 8)\n"
        "    except DataError as error:\n        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(data)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 60 and all(
        "is truncated" in line or "is not an LMDB" in line for line in said
    )
    assert f"is truncated: it has {data.stat().st_size} of " in said[-1]


def test_lsun_from_its_lmdb(tmp_path: Path, real_images: np.ndarray) -> None:
    root = make_lmdb(tmp_path / "tower_train_lmdb", real_images[:60].repeat(3, axis=2))
    said: list[str] = []
    dataset = load_dataset("lsun", str(root), 32, tmp_path / "cache", said.append)
    assert (
        dataset.name == "lsun-tower_train"
        and sum(len(part) for part in dataset.parts.values()) == 60
    )
    assert (
        dataset.image_size == 32
        and len(dataset.skipped) == 1
        and any("skipped ffff" in line for line in said)
    )
    assert load_dataset("lsun", str(root)).image_size == 64
    with pytest.raises(DataError, match="holds no data.mdb"):
        load_dataset("lsun", str(tmp_path))


@pytest.mark.filterwarnings("ignore:unclosed file")  # NumPy leaves it to the garbage collector
@pytest.mark.parametrize(
    "labels, message",
    [
        (np.arange(11), "batch_1.npz holds 10 images and 11 labels"),
        (np.array(1), r"batch_1.npz: the labels must be whole numbers \(N,\), got int64 \(\)"),
    ],
    ids=["too many", "not a list"],
)
def test_labels_that_do_not_match_their_images_are_refused(
    labels: np.ndarray, message: str, tmp_path: Path
) -> None:
    images = planes(np.zeros((10, 64, 64, 3), np.uint8))
    np.savez(tmp_path / "train_data_batch_1.npz", data=images, labels=labels)
    np.savez(tmp_path / "val_data.npz", data=images, labels=np.arange(10))
    with pytest.raises(DataError, match=message):
        load_dataset("imagenet64", str(tmp_path))


def test_the_size_is_known_before_a_data_set_is_loaded(tmp_path: Path) -> None:
    names = ("stl10", "imagenet64", "lsun")
    assert [image_size_of(name, str(tmp_path)) for name in names] == [48, 64, 64]
    with pytest.raises(DataError, match="images of imagenet64 have 64 pixels per side"):
        load_dataset("imagenet64", str(tmp_path), 32)
