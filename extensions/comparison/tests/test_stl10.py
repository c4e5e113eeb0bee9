"""Small copies of STL-10 in its format."""

import numpy as np
import pytest

from tests.test_cifar10 import archive
from training.data import DataError
from training.datasets import image_size_of, load_dataset


def test_stl10_from_its_binary_files(tmp_path, real_images):
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


def test_stl10_without_its_unlabelled_images_has_labels(tmp_path, real_images):
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


def test_the_size_is_known_before_a_data_set_is_loaded(tmp_path):
    assert image_size_of("stl10", str(tmp_path)) == 48
