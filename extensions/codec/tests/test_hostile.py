"""Archives from anywhere: each is refused with a clear error, or loses a chunk."""

from __future__ import annotations

import json
import os
import random
import re
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("constriction")

from ade_cli.main import main
from extensions.codec import chunks, decompress, networks
from extensions.codec.chunks import Chunk, ChunkCoder
from extensions.codec.compress import compress
from extensions.codec.errors import CodingError, Damaged
from extensions.codec.image_coder import ImageCoder
from extensions.codec.pictures import Picture
from extensions.codec.sources import open_source
from extensions.codec.tests.models import MANIFEST, Members, members_of, saved


def write_archive(path, members, packed=zipfile.ZIP_STORED, twice=""):
    with zipfile.ZipFile(path, "w", packed) as file:
        for name, content in members.items():
            file.writestr(name, content)
        if twice:
            with pytest.warns(UserWarning, match="Duplicate"):
                file.writestr(twice, b"")


def changed(name, **fields):
    def change(members):
        members[name] = json.dumps({**json.loads(members[name]), **fields}).encode()

    return change


def with_member(name, content=b""):
    def change(members):
        members.pop(name, None)
        if content is not None:
            members[name] = content

    return change


REFUSED: dict[str, tuple[Callable[[Members], None], str]] = {
    "climbs": (with_member("../evil"), r"holds '../evil', which no archive has"),
    "surplus": (with_member("00004.bin"), "holds '00004.bin', which no archive has"),
    "missing": (with_member("00001.bin", None), "is not complete: 00001.bin is missing"),
    "other zip": (with_member(MANIFEST, None), "not an archive .* manifest.json is missing"),
    "no JSON": (with_member(MANIFEST, b"{"), "not an archive .* manifest.json is not JSON"),
    "no object": (with_member(MANIFEST, b"[]"), "format_version must be 2, got None"),
    "nested": (with_member(MANIFEST, b"[" * 10**5), "manifest.json is not JSON"),
    "version": (changed(MANIFEST, format_version=3), "format_version must be 2, got 3"),
    "no counts": (changed(MANIFEST, chunks=[]), "no valid field chunks"),
    "counts": (changed(MANIFEST, chunks=[True, 512]), "no valid field chunks"),
    "too many": (changed(MANIFEST, chunks=[513]), "no valid field chunks"),
    "shape": (changed(MANIFEST, shape=[151, 8, 8, 3]), "no valid field shape"),
    "large": (changed(MANIFEST, shape=[150, 8, 4001, 3]), "no valid field shape"),
    "model": (changed(MANIFEST, bundle={"model": "\x1b[2J"}), r"with the model '\\x1b\[2J', and"),
    "no bundle": (changed(MANIFEST, bundle="av-ade"), "no valid field bundle"),
    "files": (changed(MANIFEST, shape=None), "holds files: give a new folder"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_hostile_archives_are_refused(change, message, archived, bundle, tmp_path):
    members = members_of(archived)
    change(members)
    write_archive(archived, members)
    with pytest.raises(CodingError, match=message) as refused:
        decompress.decompress(archived, tmp_path / "back.npy", bundle)
    assert str(refused.value).isprintable()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.npy", "out.ade"]


def test_files_that_are_no_archives_are_refused(archived, bundle, tmp_path):
    good, members = archived.read_bytes(), members_of(archived)
    write_archive(archived, members, twice="00000.bin")
    double = archived.read_bytes()
    write_archive(archived, {**members, MANIFEST: b" " * 2**25}, zipfile.ZIP_DEFLATED)
    bomb = archived.read_bytes()
    for content, message in (
        (b"", "not an archive of ade compress, or it is truncated"),
        (b"text", "not an archive of ade compress, or it is truncated"),
        (good[: len(good) // 2], "not an archive of ade compress, or it is truncated"),
        (good[:-1], "not an archive of ade compress, or it is truncated"),
        (b"\x89ADE\r\n\x1a\n" + good, "format 1, of .* restore it with the commit 443d5eb3"),
        (double, "holds '00000.bin' twice"),
        (bomb, "manifest.json has 33,554,432 bytes: at most"),
    ):
        archived.write_bytes(content)
        with pytest.raises(CodingError, match=message):
            decompress.decompress(archived, tmp_path / "back.npy", bundle)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CodingError, match="pipe must be a regular file"):
        decompress.decompress(tmp_path / "pipe", tmp_path / "back.npy", bundle)
    assert not (tmp_path / "back.npy").exists()


def table(**fields):
    return changed("00001.json", **fields)


# What a chunk may be, with checksums of the zip that are right.
DAMAGED: dict[str, tuple[Callable[[Members], None], str]] = {
    "digest": (table(sha256=64 * "0"), "not those that were encoded"),
    "no digest": (table(sha256=None), "not those that were encoded"),
    "no table": (with_member("00001.json", b"[]"), "table of a chunk is not complete"),
    "no JSON": (with_member("00001.json", b"\xff"), "00001.json is not JSON"),
    "further field": (table(other=1), "table of a chunk is not complete"),
    "kind": (table(kinds="x" * 40), "table of a chunk is not valid"),
    "few": (table(kinds="s", sizes=[4]), "table of a chunk is not valid"),
    "size": (table(kinds="s" * 40, sizes=40 * [10**18]), "a chunk is incomplete"),
    "below 0": (table(kinds="s" * 40, sizes=40 * [-1]), "table of a chunk is not valid"),
    "no size": (table(kinds="s" * 40, sizes=40 * [True]), "table of a chunk is not valid"),
    "no initial": (table(kinds="i" * 40, sizes=40 * [4]), "."),
    "all coded": (table(kinds="m" * 40, sizes=[]), "."),
    "names": (table(names=40 * ["a"]), "images of an array have no names"),
    "no names": (table(names=[3]), "table of a chunk is not valid"),
    "no bits": (with_member("00001.bin"), "."),
    "zeros": (with_member("00001.bin", bytes(10**5)), "."),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_chunk_loses_its_own_images_alone(
    change, message, archived, bundle, small_images, tmp_path
):
    members, warnings = members_of(archived), list[str]()
    change(members)
    write_archive(archived, members)
    result = decompress.decompress(archived, tmp_path / "back.npy", bundle, warnings.append)
    assert result.lost == [range(40, 80)] and result.restored == 110
    assert len(warnings) == 1 and warnings[0].startswith("the images 41 to 80 are lost: ")
    assert re.search(message, warnings[0])
    expected = small_images[:150].copy()
    expected[40:80] = 0
    assert np.array_equal(np.load(tmp_path / "back.npy"), expected)


def test_damage_is_told_by_the_command(archived, bundle, tmp_path, capsys):
    """Any byte may be wrong: the archive is refused, or some images are lost and the rest right."""
    good, images = archived.read_bytes(), np.load(tmp_path / "in.npy")
    generator = random.Random(0)
    for i in range(12):
        bad = bytearray(good)
        bad[generator.randrange(len(bad))] ^= 1 << generator.randrange(8)
        archived.write_bytes(bad)
        back = tmp_path / f"{i}.npy"
        words = ["decompress", str(archived), str(back), "--bundle", str(bundle.folder)]
        status, said = main(words), capsys.readouterr().err
        if status == 2:
            assert said and not back.exists()
            continue
        found = np.load(back)
        lost = ~(found == images).all((1, 2, 3))
        assert not found[lost].any() and status == (3 if lost.any() else 0)
        assert ("are lost" in said) == lost.any()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["../a.png", "b.png"], "'../a.png', which leaves"),
        (["/a.png", "b.png"], "'/a.png', which leaves"),
        (["a\0.png", "b.png"], r"which leaves"),
        (["a\\..\\b.png", "b.png"], r"which leaves"),
        (["", "b.png"], r"'', which leaves"),
        ([64 * "a/" + "b.png", "b.png"], r"which leaves"),
        (["a.png", "a.png"], "second image for 'a.png'"),
        (["a.png", "a.png/b.png"], "second image for 'a.png/b.png'"),
        ([300 * "a", "b.png"], "cannot be written: File name too long"),
    ],
)
def test_names_that_an_archive_cannot_restore_are_refused(names, message, folder, bundle, tmp_path):
    path = tmp_path / "evil.ade"
    for extra in [p for p in folder.rglob("*") if p.is_file()][2:]:
        extra.unlink()
    compress(open_source(folder), path, bundle)
    members = members_of(path)
    changed("00000.json", names=names)(members)
    write_archive(path, members)
    with pytest.raises(CodingError, match=message) as refused:
        decompress.decompress(path, tmp_path / "back", bundle)
    assert ".tmp" not in str(refused.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.ade", "images"]


def test_hostile_bits_are_damaged_chunks(bundle, small_images, monkeypatch):
    """Whatever a chunk holds, decoding ends with ``Damaged``."""
    loaded = networks.Networks(bundle)
    coder = ChunkCoder(ImageCoder(loaded), loaded.image_shape)
    pictures = [Picture(image, saved("PNG"), True) for image in small_images[:40]]
    good, _ = coder.encode(40 * ["a.png"], pictures)
    assert "m" in good.kinds
    generator = random.Random(0)
    for _ in range(30):
        bad = bytearray(good.data)
        for _ in range(generator.choice((1, 3, 100))):
            bad[generator.randrange(len(bad))] ^= generator.randrange(1, 256)
        if generator.random() < 0.3:
            del bad[generator.randrange(len(bad)) :]
        with pytest.raises(Damaged):
            coder.decode(Chunk(**{**vars(good), "data": bytes(bad)}), None)
    monkeypatch.setattr(chunks, "MAX_BYTES", 1000)
    with pytest.raises(Damaged, match="too many pixels"):
        coder.decode(good, None)


def test_an_array_that_does_not_fit_on_the_disk(archived, bundle, tmp_path):
    """A small archive may promise many large images, which are black."""
    members = members_of(archived)
    count = 2**15
    changed(MANIFEST, chunks=count * [512], shape=[512 * count, 4000, 4000, 3])(members)
    for i in range(count):
        members[f"{i:05}.json"] = members[f"{i:05}.bin"] = b""
    write_archive(archived, members)
    with pytest.raises(CodingError, match="no room for .* GiB of images"):
        decompress.decompress(archived, tmp_path / "back.npy", bundle)
