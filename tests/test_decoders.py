"""Decompression bombs, and the processes that decode untrusted files."""

from __future__ import annotations

import io
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ade_base.pictures import decoders
from ade_base.pictures.convert import decode
from ade_base.pictures.decoders import decode_apart
from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import file_size, read_image
from ade_base.pictures.show import write_png
from ade_base.pictures.structure import read_structure
from fitting.survey import size_of
from serving.api.service import Service
from serving.ingest.requests import RawRequest
from tests.bomb_files import tiff_of_tiles
from tests.bombs import BOMBS, HARMLESS, REASONS
from tests.helpers import HAS_HEIF, ROOT, encode, suspended

MODERN = ("AVIF", "HEIF") if HAS_HEIF else ("AVIF",)
EXAMPLE = ROOT / "serving" / "examples" / "cat.png"


@pytest.fixture(autouse=True)
def _no_decoders_left():
    """Each test starts without idle processes, and leaves none."""
    _end_all()
    yield
    _end_all()


def _end_all():
    while decoders._idle:
        decoders._idle.pop().end()


@pytest.fixture(scope="module")
def gif():
    """A file that is always decoded in another process."""
    return encode(Image.new("RGB", (4, 4), "red"), "GIF")


def _measured(names):
    done = subprocess.run(
        [sys.executable, "-m", "tests.bombs", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
    )
    rows = map(json.loads, done.stdout.splitlines())
    return {row["name"]: row for row in rows}


@pytest.fixture(scope="module")
def refused():
    return _measured([name for name in BOMBS if name not in HARMLESS])


@pytest.mark.parametrize("name", [name for name in BOMBS if name not in HARMLESS])
def test_a_bomb_is_refused_with_its_reason(refused, name):
    """Cost is processor time, the start of a process included.

    It is far below these limits; a busy machine doubles it.
    """
    row = refused[name]
    assert (
        row["outcome"].split(":")[0] in ("too_large", "not_an_image")
        and REASONS.get(name, "") in row["outcome"]
    )
    assert (
        row["bytes"] <= 16 * 2**20
        and row["cpu_seconds"] < 3
        and row["header_cpu_seconds"] < 1
        and row["MiB"] < 286
    )


@pytest.mark.parametrize(
    "sizes",
    [
        (257, 30, 256, 256),
        (300, 70, 256, 256),
        (1000, 1000, 512, 512),
        (4000, 100, 256, 256),
        (1030, 1030, 1024, 1024),
    ],
)
def test_a_tiff_in_usual_tiles_is_decoded(sizes):
    width, height, _, _ = sizes
    assert read_image(tiff_of_tiles(*sizes)).pixels.shape == (height, width, 3)


@pytest.mark.slow
def test_pictures_of_the_largest_size_are_decoded():
    """Within the limits of the decoder's process, which would end it."""
    measured = _measured(sorted(HARMLESS))
    assert measured.keys() == set(HARMLESS)
    for row in measured.values():
        assert row["outcome"].startswith("decoded") and row["MiB"] < 512, row


def _files(real_images):
    """Good files of many kinds, those included that are decoded in this process."""
    picture = Image.fromarray(real_images[0]).resize((40, 30))
    files = {}
    for orientation in (0, 1, 3, 6, 9):  # in an AVIF or HEIC, it becomes a property
        exif = Image.Exif()
        exif[0x0112] = orientation
        files |= {
            f"{format} turned {orientation}": encode(picture, format, exif=exif)
            for format in ("PNG", "JPEG", "WEBP", "TIFF", *MODERN)
        }
    alpha = picture.copy()
    alpha.putalpha(picture.convert("L"))
    sixteen = Image.fromarray((np.asarray(picture.convert("L")).astype(np.uint16) << 8) + 7)
    by_mode = {
        "RGB": picture,
        "RGBA": alpha,
        "LA": alpha.convert("LA"),
        "P": picture.quantize(16),
        "I;16": sixteen,
        **{mode: picture.convert(mode) for mode in ("L", "1", "CMYK", "YCbCr")},
    }
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *MODERN):
        for mode, image in by_mode.items():
            try:
                files[f"{format} {mode}"] = encode(image, format)
            except (OSError, ValueError, KeyError):  # the format has no such mode
                continue
    del files["TIFF YCbCr"]  # Pillow cannot read what it writes
    files |= {
        f"TIFF {name}": encode(picture, "TIFF", compression=name)
        for name in ("tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits")
    }
    files["JPEG progressive"] = encode(picture, "JPEG", progressive=True)
    files["JPEG profile"] = encode(picture, "JPEG", icc_profile=bytes(100_000), comment=b"hello")
    files["PNG text"] = encode(picture, "PNG", icc_profile=bytes(1000))
    files["PNG palette"] = encode(picture.quantize(16), "PNG", transparency=3)
    for format in ("PNG", "WEBP", "GIF", "TIFF", *MODERN):
        files[f"{format} frames"] = encode(
            picture, format, save_all=True, append_images=[alpha.convert("RGB").rotate(90)]
        )
    files["MPO"] = encode(picture, "MPO", save_all=True, append_images=[picture.rotate(90)])
    return files


def test_good_files_are_decoded_alike_in_both_places(real_images):
    plain = 0
    files = _files(real_images)
    for name, data in files.items():
        structure = read_structure(data)
        here, there = decode(data, structure), decode_apart(data, structure)
        assert np.array_equal(here.pixels, there.pixels) and here.notes == there.notes, name
        plain += structure.is_plain
        with Image.open(io.BytesIO(data)) as image:
            assert file_size(data) == image.size, name
            if image.mode in ("RGB", "L", "CMYK", "YCbCr", "1"):
                expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
                assert np.array_equal(here.pixels, expected), name
    assert 20 < plain < 60 and len(files) > 70
    assert len(decoders._idle) == 1


def test_large_pictures_are_converted_in_blocks():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1200, 1000, 4), np.uint8)
    decoded = read_image(encode(Image.fromarray(pixels), "PNG", compress_level=1))
    white = Image.new("RGBA", (1000, 1200), "white")
    expected = Image.alpha_composite(white, Image.fromarray(pixels)).convert("RGB")
    assert np.array_equal(decoded.pixels, np.asarray(expected)) and decoded.notes == [
        "alpha composited on white"
    ]
    wide = rng.integers(0, 256, (2, 2**20 + 5), np.uint8)
    decoded = read_image(encode(Image.fromarray(wide), "PNG", compress_level=1))
    assert np.array_equal(decoded.pixels[..., 1], wide) and decoded.notes == [
        "converted from L to RGB"
    ]


def test_small_plain_files_need_no_process():
    picture = Image.open(EXAMPLE).convert("RGB")
    for format in ("PNG", "JPEG", "WEBP", "BMP"):
        read_image(encode(picture, format))
    assert not decoders._idle


def test_sizes_are_read_only_from_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    assert size_of(EXAMPLE) == (32, 32)
    assert all(
        size_of(tmp_path / name) is None for name in ("pipe.png", "endless.png", "missing.png")
    )


def test_a_process_that_ended_is_replaced(gif):
    """Also if it ends when it is asked, as an idle one would."""
    expected = read_image(gif).pixels
    (killed,) = decoders._idle
    os.kill(killed.pid, signal.SIGKILL)
    psutil.Process(killed.pid).wait(10)
    assert np.array_equal(read_image(gif).pixels, expected)
    (second,) = decoders._idle
    assert second.pid != killed.pid
    second._connection.shutdown(1)  # it reads the end
    assert np.array_equal(read_image(gif).pixels, expected)


def test_signals_to_a_whole_group_leave_it_to_the_parent(gif):
    """The service still answers what it has accepted, and must not call an image damaged."""
    read_image(gif)
    (decoder,) = decoders._idle
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(decoder.pid, number)
        assert read_image(gif).pixels.shape == (4, 4, 3)
        assert [one.pid for one in decoders._idle] == [decoder.pid]


def test_a_process_that_hangs_is_an_error_of_its_image(gif, monkeypatch):
    read_image(gif)
    (decoder,) = decoders._idle
    monkeypatch.setattr(decoders, "WALL_SECONDS", 0.5)
    started = time.monotonic()
    late = pytest.raises(ImageError, match="was not decoded within 0.5 seconds")
    with suspended(psutil.Process(decoder.pid)), late as error:
        read_image(gif)
    assert error.value.code == "too_large" and time.monotonic() - started < 20
    assert error.value.is_transient
    assert not psutil.pid_exists(decoder.pid)
    monkeypatch.undo()
    assert read_image(gif).pixels.shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("constant", "value", "bomb", "message"),
    [
        ("CPU_SECONDS", 0.05, "tiff-deflate", "takes more than 0.05 seconds"),
        ("MEMORY_BYTES", 32 * 2**20, "bmp-1-bit", "takes more than 32 MiB"),
    ],
)
def test_processor_time_and_memory_are_limited(constant, value, bomb, message, gif, monkeypatch):
    monkeypatch.setattr(decoders, constant, value)
    with pytest.raises(ImageError, match=message) as error:
        read_image(BOMBS[bomb]())
    assert error.value.code == "too_large"
    monkeypatch.undo()
    assert read_image(gif).pixels.shape == (4, 4, 3)


def test_a_lower_memory_limit_of_the_service_remains(gif):
    """It is no reason not to decode images that need less."""
    script = "import sys; from ade_base.pictures.read import *; read_image(sys.stdin.buffer.read())"
    limited = ["bash", "-c", 'ulimit -v 400000; exec "$0" -c "$1"', sys.executable, script]
    done = subprocess.run(limited, input=gif, cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", range(11))
def test_an_invalid_answer_is_an_error_of_its_image(monkeypatch, gif, kind):
    monkeypatch.setattr(decoders, "PROGRAM", "tests.babbling_decoder")
    monkeypatch.setattr(decoders, "WALL_SECONDS", 3.0)
    with pytest.raises(ImageError):
        read_image(gif[:-1] + bytes([kind]))
    monkeypatch.undo()
    assert read_image(gif).pixels.shape == (4, 4, 3)


def test_a_process_that_does_not_start_is_not_an_image_error(monkeypatch, gif):
    """Otherwise a whole folder would be skipped as damaged."""
    monkeypatch.setattr(decoders, "PROGRAM", "tests.no_such_module")
    with pytest.raises(RuntimeError, match="did not start"):
        read_image(gif)


def test_no_room_for_a_process_fails_its_requests_alone(
    monkeypatch, real_images, pretrained_engine
):
    monkeypatch.setattr(decoders, "PROGRAM", "tests.no_such_module")
    service = Service("score", pretrained_engine)
    files = [encode(Image.new("RGB", (32, 32), "red"), "GIF"), write_png(real_images[0])]
    refused, scored = service.answer([RawRequest("application/octet-stream", its) for its in files])
    assert (refused.status, scored.status) == (503, 200) and not service.is_exhausted
    assert json.loads(refused.body)["error"]["message"].startswith("the images cannot be decoded")


def test_idle_processes_end(monkeypatch, gif):
    monkeypatch.setattr(decoders, "IDLE_SECONDS", 0.2)
    read_image(gif)
    assert psutil.Process(decoders._idle[0].pid).wait(10) == 0
    assert read_image(gif).pixels.shape == (4, 4, 3) and len(decoders._idle) == 1


def test_threads_have_a_process_each_and_share_them(gif):
    with ThreadPoolExecutor(3) as pool:
        shapes = {decoded.pixels.shape for decoded in pool.map(read_image, [gif] * 60)}
    assert shapes == {(4, 4, 3)} and 1 <= len(decoders._idle) <= 3


def test_a_forked_process_has_no_decoders(gif):
    read_image(gif)
    child = os.fork()
    if not child:
        os._exit(len(decoders._idle))
    assert os.waitpid(child, 0)[1] == 0 and len(decoders._idle) == 1


def test_a_decoder_ends_with_its_parent_and_inherits_no_secrets(tmp_path, gif):
    (tmp_path / "image.gif").write_bytes(gif)
    script = (
        "import sys, time; from pathlib import Path\n"
        "from ade_base.pictures import read; from ade_base.pictures import decoders as pool\n"
        "read.read_image(Path(sys.argv[1]).read_bytes())\n"
        "print(pool._idle[0].pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "image.gif"],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "ADE_TOKEN": "hush"},
    )
    assert parent.stdout is not None
    decoder = psutil.Process(int(parent.stdout.readline()))
    assert "hush" not in decoder.environ().values() and decoder.environ().keys().isdisjoint(
        {"ADE_TOKEN"}
    )
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs([decoder], timeout=10)
    assert not alive


def _seeds():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    formats = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *MODERN)
    made = [encode(picture, format) for format in formats]
    made += [
        encode(picture, format, exif=exif) for format in ("PNG", "JPEG", "WEBP", "TIFF", *MODERN)
    ]
    made += [
        encode(picture, "TIFF", compression=name)
        for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits")
    ]
    made += [
        encode(picture, format, save_all=True, append_images=[picture.rotate(180)])
        for format in ("PNG", "WEBP", "GIF", "TIFF", "MPO", *MODERN)
    ]
    return [
        *made,
        encode(picture, "JPEG", progressive=True),
        encode(picture, "GIF", comment=b"x" * 300),
    ]


SEEDS = _seeds()
EDIT = st.tuples(st.integers(0, 2**16), st.integers(0, 3), st.binary(min_size=1, max_size=8))


@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.sampled_from(SEEDS), edits=st.lists(EDIT, min_size=1, max_size=6))
def test_a_mutated_file_is_an_image_or_an_image_error(seed, edits):
    data = bytearray(seed)
    for where, kind, new in edits:
        at = where % (len(data) + 1)
        if kind == 0:  # change
            data[at : at + len(new)] = new
        elif kind == 1:  # insert
            data[at:at] = new * 50
        elif kind == 2:  # remove
            del data[at : at + len(new)]
        else:  # repeat
            data[at:at] = data[at // 2 : at] * 3
    started = time.monotonic()
    size = file_size(bytes(data))
    try:
        decoded = read_image(bytes(data))
        assert decoded.pixels.dtype == np.uint8 and size in (
            decoded.pixels.shape[1::-1],
            decoded.pixels.shape[:2],
        )
    except ImageError as error:
        assert error.code in ("not_an_image", "too_large") and str(error)
    assert time.monotonic() - started < decoders.WALL_SECONDS + 20


@pytest.mark.slow
def test_good_traffic_beside_a_stream_of_bombs(service):
    """Compares with the same traffic beside invalid files, which shows the machine's speed."""
    names = [
        *(name for name in REASONS if name in BOMBS),  # without HEIC's decoder, not its
        "jpeg-mpf-tags",
        "png-raw-profile",
        "png-iccp",
        "gif-comments",
        "png-chunks",
        "jpeg-tables",
    ]
    bombs = [BOMBS[name]() for name in names]
    workers = {process.pid for process in service.workers()}
    assert workers
    junk = [b"not an image".ljust(len(bomb)) for bomb in bombs]
    alone = _seconds_beside(service, junk, seconds=5)
    beside = _seconds_beside(service, bombs, seconds=15)
    assert workers == {process.pid for process in service.workers()}
    print(
        "\n".join(
            f"{kind}: {len(taken)} requests, median {statistics.median(taken):.3f} s, "
            f"longest {max(taken):.3f} s"
            for kind, taken in (("beside junk", alone), ("beside bombs", beside))
        )
    )
    # Not the maxima: one pause of the machine would decide.
    assert np.quantile(beside, 0.95) < max(2.0, 4 * np.quantile(alone, 0.95))


def _seconds_beside(service, bad, seconds):
    """Seconds of each request for a good image while two clients send bad files."""
    stop = threading.Event()
    refused: list[tuple[int, str]] = []
    taken = []

    def send_bad(first):
        with httpx.Client(base_url=service.url, timeout=120) as http:
            for i in range(first, 10**6):
                if stop.is_set():
                    return
                answer = http.post(
                    "/predictions/score", files={"image": bad[i % len(bad)]}, data={"resize": "fit"}
                )
                refused.append((answer.status_code, answer.json()["error"]["code"]))

    with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=service.url, timeout=120) as http:
        sending = [pool.submit(send_bad, first) for first in (0, len(bad) // 2)]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            started = time.monotonic()
            answer = http.post(
                "/predictions/score",
                content=EXAMPLE.read_bytes(),
                headers={"Content-Type": "image/png"},
            )
            taken.append(time.monotonic() - started)
            assert answer.status_code == 200, answer.text
            stages = dict(
                stage.split(";dur=") for stage in answer.headers["Server-Timing"].split(", ")
            )
            assert float(stages["decode"]) < 1000, stages
        stop.set()
        for each in sending:
            each.result()
    assert len(refused) > len(bad) and set(refused) <= {(413, "too_large"), (415, "not_an_image")}
    return taken
