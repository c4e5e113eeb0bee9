"""Folders of images, the cache of what they decode to, and what every data set has."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ade_base.files import LOCK, read_file
from ade_base.pictures.limits import ImageError
from fitting.survey import picture_sizes
from tests.helpers import make_folder, make_traps
from training.data import DataError, ImageSet
from training.datasets import NAMES, files, image_size_of, load_dataset
from training.datasets.files import part_of
from training.datasets.folder import image_files, load_files


def test_any_folder_of_images(tmp_path, small_images):
    folder = make_folder(tmp_path / "images", small_images[:120])
    said: list[str] = []
    dataset = load_dataset(str(folder), None, 8, cache=tmp_path / "cache", report=said.append)
    assert sum(len(part) for part in dataset.parts.values()) == 121
    assert len(dataset.parts["train"]) > 70 and all(len(p) for p in dataset.parts.values())
    assert list(dataset.skipped) == ["broken.png", "empty.jpg"]
    assert any("skipped" in line and "broken.png" in line for line in said)
    again = load_dataset(str(folder), None, 8, cache=tmp_path / "cache")
    in_memory = load_dataset(str(folder), None, 8)
    for part, images in dataset.parts.items():
        for other in (again, in_memory):
            assert np.array_equal(images.images[:], other.parts[part].images[:])


def test_the_cache_distinguishes_folders_with_the_same_files_and_its_own_versions(
    tmp_path, monkeypatch
):
    for name, grey in (("a", 10), ("b", 200)):
        (tmp_path / name).mkdir()
        for i in range(10):  # of equal size, and modified at the same time
            path = tmp_path / name / f"{i}.bmp"
            Image.new("RGB", (8, 8), (grey,) * 3).save(path)
            os.utime(path, (0, 0))
    cache = tmp_path / "cache"
    for name, grey in (("a", 10), ("b", 200)):
        dataset = load_dataset(str(tmp_path / name), None, 8, cache)
        assert (dataset.parts["train"].images[:] == grey).all()
    before = set(cache.iterdir())
    load_dataset(str(tmp_path / "a"), None, 8, cache)
    assert set(cache.iterdir()) == before
    monkeypatch.setattr("training.datasets.files._PREPROCESSING", 99)
    load_dataset(str(tmp_path / "a"), None, 8, cache)
    after = set(cache.iterdir())
    assert after != before and len(after) == len(before)


def test_a_changed_folder_replaces_its_own_copy_alone(tmp_path):
    def load(source, version):
        def fill(pixels):
            pixels[:] = int(version)
            return {}, True

        return files.cached_pixels(source, version, lambda: (2, 8, 8, 3), tmp_path, fill)[0]

    first, other = load("folder, 8 pixels", "1"), load("folder, 16 pixels", "1")
    before = set(tmp_path.iterdir())
    assert (load("folder, 8 pixels", "2") == 2).all() and (first == 1).all() and (other == 1).all()
    after = set(tmp_path.iterdir())
    assert len(before - after) == len(after - before) == 2
    (gone,) = (path for path in after - before if path.suffix == ".npy")
    gone.unlink()  # as by another process that found the folder changed
    assert (load("folder, 8 pixels", "2") == 2).all()


def test_nodes_keep_each_others_copies(tmp_path, monkeypatch):
    """Files that were copied to each node have other times there."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    filled = []

    def fill(pixels):
        filled.append(pixels)
        return {}, True

    for version in ("1", "2", "1", "2"):
        files.cached_pixels("folder", version, lambda: (2, 8, 8, 3), tmp_path, fill)
    assert len(filled) == 2 and len(list(tmp_path.glob("*.npy"))) == 2
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    files.cached_pixels("folder", "3", lambda: (2, 8, 8, 3), tmp_path, fill)
    assert len(list(tmp_path.glob("*.npy"))) == 1


def test_only_regular_files_are_read(tmp_path, small_images, monkeypatch):
    monkeypatch.setattr(files, "RETRY_S", 0.0)
    folder = tmp_path / "images"
    for i, image in enumerate(small_images[:30]):
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    (folder / "link.png").symlink_to(folder / "0.png")
    reasons = make_traps(folder)
    dataset = load_dataset(str(folder), None)
    assert dataset.skipped == reasons
    assert dataset.image_size == 8 and sum(map(len, dataset.files.values())) == 31
    assert picture_sizes(image_files(folder)) == {(8, 8): 31, None: 4}


def test_the_first_images_of_a_part_are_from_every_folder(tmp_path):
    for grey in range(4):
        (tmp_path / str(grey)).mkdir()
        for i in range(60):
            Image.new("RGB", (8, 8), (60 * grey,) * 3).save(
                tmp_path / str(grey) / f"{grey}-{i}.png"
            )
    first = load_dataset(str(tmp_path), None, 8).parts["train"].images[:40]
    assert len(np.unique(first[:, 0, 0, 0])) == 4


def test_an_incomplete_read_leaves_no_cache(tmp_path, small_images, monkeypatch):
    folder, cache = make_folder(tmp_path / "images", small_images[:20]), tmp_path / "cache"
    sizes: list[int] = []

    def refuse(side):
        sizes.append(side)
        raise DataError("not that size")

    with pytest.raises(DataError, match="not that size"):
        load_dataset(str(folder), None, None, cache, fits=refuse)
    assert sizes == [8] and not cache.exists()  # asked before anything was decoded

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        for kept in (cache, None):
            with pytest.raises(DataError, match=r"no room for 0\.0 GiB.*smaller image size"):
                load_dataset(str(folder), None, 8, kept)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files, "resize_centre", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_dataset(str(folder), None, 8, cache)
    assert [path.name for path in cache.iterdir()] == [LOCK]


def test_a_file_that_cannot_be_read_now_is_tried_again(tmp_path, small_images, monkeypatch):
    folder, cache = make_folder(tmp_path / "images", small_images[:20]), tmp_path / "cache"

    def fail(path):
        if path.name == "0007.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_file(path)

    monkeypatch.setattr(files, "RETRY_S", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr("training.datasets.folder.read_file", fail)
        dataset = load_dataset(str(folder), None, 8, cache)
    assert "Input/output error" in dataset.skipped.values()
    again = load_dataset(str(folder), None, 8, cache)
    assert len(dataset.skipped) == 3 and len(again.skipped) == 2
    (folder / "gone.png").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.png")
    again = load_dataset(str(folder), None, 8, cache)
    assert len(again.skipped) == 4
    # What cannot change without another size or time is not tried again.
    monkeypatch.setattr("training.datasets.folder.decode_into", None)
    assert load_dataset(str(folder), None, 8, cache).skipped == again.skipped


@pytest.mark.parametrize("recovers", [True, False])
def test_an_outage_of_the_storage_leaves_out_no_class(
    recovers, tmp_path, small_images, monkeypatch
):
    folder = make_folder(tmp_path / "images", small_images[:60])
    failed: set[Path] = set()

    def fail(path):
        if path.parent.name == "class1" and not (recovers and path in failed):
            failed.add(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read_file(path)

    monkeypatch.setattr(files, "RETRY_S", 0.0)
    monkeypatch.setattr("training.datasets.folder.read_file", fail)
    if recovers:
        assert len(load_dataset(str(folder), None, 8).skipped) == 2
        return
    with pytest.raises(DataError, match=r"20 of 63 files cannot .*class1.*Stale file handle \(as"):
        load_dataset(str(folder), None, 8)
    listed = image_files(folder)
    (folder / "class1").rename(tmp_path / "lost")
    with pytest.raises(DataError, match="20 of 63 files cannot be read now"):
        load_files(folder, listed, 8, None, print)


def test_a_decoder_that_may_succeed_next_time_is_tried_again(tmp_path, small_images, monkeypatch):
    folder, cache = make_folder(tmp_path / "images", small_images[:20]), tmp_path / "cache"

    def hang(content):
        raise ImageError("too_large", "the image was not decoded in time", is_transient=True)

    with monkeypatch.context() as patched:
        patched.setattr(files, "RETRY_S", 0.0)
        patched.setattr(files, "read_image", hang)
        with pytest.raises(DataError, match=r"23 of 23 files cannot be .*in time \(as"):
            load_dataset(str(folder), None, 8, cache)
    assert len(load_dataset(str(folder), None, 8, cache).skipped) == 2


@pytest.mark.parametrize("suffix", ["json", "npy"])
def test_a_damaged_cache_is_filled_again(suffix, tmp_path, small_images):
    folder, cache = make_folder(tmp_path / "images", small_images[:20]), tmp_path / "cache"
    before = load_dataset(str(folder), None, 8, cache)
    (stored,) = cache.glob(f"images-*.{suffix}")
    whole = stored.read_bytes()
    for length in (0, 10, len(whole) // 2):
        stored.unlink()  # arrays that map it stay whole
        stored.write_bytes(whole[:length])
        again = load_dataset(str(folder), None, 8, cache)
        assert again.skipped == before.skipped
        assert np.array_equal(again.parts["train"].images[:], before.parts["train"].images[:])


def test_processes_that_start_together_fill_a_cache_once(tmp_path):
    filled: list[int] = []
    (tmp_path / "images.tmp").write_bytes(bytes(1000))  # of a process that was killed

    def fill(pixels):
        filled.append(len(pixels))
        time.sleep(0.1)
        pixels[:] = 7
        return {1: "damaged"}, True

    def load(_):
        return files.cached_pixels("one", "first", lambda: (2, 8, 8, 3), tmp_path, fill)

    with ThreadPoolExecutor(3) as pool:
        for pixels, skipped in pool.map(load, range(3)):
            assert (pixels == 7).all() and skipped == {1: "damaged"}
    assert filled == [2] and not (tmp_path / "images.tmp").exists()


def test_conversions_of_files_are_reported_once(tmp_path, small_images):
    for i, image in enumerate(small_images[:10]):
        sixteen = image[:, :, 0].astype(np.uint16) << 8
        Image.fromarray(sixteen if i < 3 else image).save(tmp_path / f"{i}.png")
    Image.fromarray(np.zeros((8, 8), np.int32)).save(tmp_path / "dark.tiff")
    said: list[str] = []
    load_dataset(str(tmp_path), None, 8, report=said.append)
    assert said[1] == "3 files: converted from 16-bit greyscale to 8 bits"
    assert said[2].startswith("skipped dark.tiff: ") and "8 or 16 bits" in said[2]
    assert len(said) == 3


def test_labels_that_do_not_match_their_images_are_refused(real_images):
    with pytest.raises(DataError, match=r"got 5 images and labels of shape \(4,\)"):
        ImageSet(real_images[:5], np.arange(4))


def test_parts_follow_the_file_name():
    assert (part_of("cat.jpg"), part_of("photo.png")) == ("train", "test")
    counts = {
        part: sum(part_of(f"{i}.png") == part for i in range(5000)) / 50
        for part in ("train", "select", "calibrate", "test")
    }
    assert counts == pytest.approx({"train": 80, "select": 4, "calibrate": 8, "test": 8}, abs=2)


@pytest.mark.parametrize(
    "data, root, message",
    [
        ("cifar10", None, "the data set cifar10 needs root"),
        ("nowhere", None, "data must be a folder or one of cifar10, .* got 'nowhere'"),
        ("cifar10", ".", "does not hold CIFAR-10"),
        (".", "x", "root goes with a named data set"),
        ("cifar-10", "x", "data must be a folder or one of cifar10, .* got 'cifar-10'"),
    ],
)
def test_missing_data_is_an_error(tmp_path, data, root, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        load_dataset(data, root)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="holds no images"):
        load_dataset(str(tmp_path), None)


def test_the_size_is_known_before_a_data_set_is_loaded(tmp_path, small_images, monkeypatch):
    """As what it is loaded with."""
    folder = str(make_folder(tmp_path / "images", small_images[:120]))
    assert image_size_of(folder, None) == load_dataset(folder, None).image_size == 8
    monkeypatch.setattr("training.datasets.folder.decode_into", None)
    assert image_size_of(folder, None, 16) == 16
    assert image_size_of("cifar10", str(tmp_path)) == 32
    with pytest.raises(DataError, match="the only image file cannot be read: .*a.png"):
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "a.png").touch()
        image_size_of(str(tmp_path / "broken"), None)


@pytest.mark.parametrize("name", NAMES)
def test_a_size_that_does_not_suit_is_refused_before_a_named_data_set_is_read(name, tmp_path):
    """Although nobody gave it: an empty folder would be refused as well, but later."""

    def refuse(side):
        raise DataError(f"not {side}")

    size = image_size_of(name, str(tmp_path))
    with pytest.raises(DataError, match=f"^not {size}$"):
        load_dataset(name, str(tmp_path), fits=refuse)
