"""Helpers that several test modules share: small models, folders of images, files and locks."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import io
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from ade_base.extensions import FOLDER
from ade_model.config import ModelConfig
from ade_model.model import ADEModel
from serving.engine.bundle import CALIBRATION_NAME, open_bundle, write_manifest
from serving.verdict.calibration_file import CalibrationPair

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
DATA_VARIABLE = "ADE_TEST_DATA"
PRETRAINED = ROOT / "pretrained" / "cifar10"
WORKER_LABELS = ("model_name", "worker", "bundle")  # of all that workers measure
TINY = ModelConfig(
    image_size=8,
    channels=3,
    widths=(8, 8),
    latent_channels=(3, 2),
    decoder_blocks=(1, 1),
    flow_couplings=2,
    flow_width=8,
    posterior_bound=True,
)
# What each extension adds to the command line: verbs, engines, data sets, options of ade export.
WORDS_OF_EXTENSIONS = {
    "codec": {"compress", "decompress", "--with-codec"},
    "comparison": {"compare", "stl10"},
    "gate_reports": {"ood-bench"},
    "ray": {"ray"},
}
HOLD = """
import sys
from pathlib import Path
from ade_base.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def address_beyond_loopback():
    """An IPv4 address of this machine beside loopback; a machine without one skips the test."""
    found = [
        its.address
        for of_one in psutil.net_if_addrs().values()
        for its in of_one
        if its.family == socket.AF_INET and not its.address.startswith("127.")
    ]
    if not found:
        pytest.skip("this machine has no address but loopback")
    return str(found[0])


def large_data(name):
    """The path of a large data set, which need not exist: see CONTRIBUTING.md."""
    return Path(os.environ.get(DATA_VARIABLE) or os.devnull) / name


def needs_data(*names):
    """Skip a test unless all these data sets exist."""
    return pytest.mark.skipif(
        not all(large_data(name).exists() for name in names),
        reason=f"set {DATA_VARIABLE} to a folder with {', '.join(names)}",
    )


def shake(model, seed=0, scale=0.15):
    """Perturb all weights, so that no layer is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(
                parameter.dtype
            )
    return model


def make_model(config=TINY, seed=0, scale=0.15):
    torch.manual_seed(seed)
    return shake(ADEModel(config), seed, scale).eval()


def narrow(name, size="tiny", image_size=8, **changes):
    """A recipe with all its special settings, but with networks of a few channels."""
    from training.recipes import recipe

    config = recipe(name, 32, 3, size, batch_size=16, **changes)
    model, levels = config.model, min(2, len(config.model.widths))
    small: dict[str, Any] = {
        "image_size": image_size,
        "widths": (8,) * levels,
        "flow_width": 8,
        "flow_couplings": 2,
        "latent_channels": tuple(
            min(3 * model.latent_groups, c) for c in model.latent_channels[:levels]
        ),
        "decoder_blocks": model.decoder_blocks[:levels],
    }
    adversaries = {}
    for name in ("discriminator", "pixel_discriminator"):
        if (its := getattr(config, name)) is not None:
            stages = 4 if its.kind == "projected" else 2 + its.plain_stages
            adversaries[name] = dataclasses.replace(its, widths=(8,) * stages)
    return dataclasses.replace(config, model=dataclasses.replace(model, **small), **adversaries)


def interrupt_after(steps, monkeypatch):
    """Interrupt training as Ctrl-C does, in the last of some steps."""
    from training.step import Trainer

    run = Trainer.run

    def interrupted(self, *given):
        if self.step + 1 == steps:
            signal.raise_signal(signal.SIGINT)
        return run(self, *given)

    monkeypatch.setattr(Trainer, "run", interrupted)


def with_calibrations(bundle, out, change, name=None):
    """Copy a bundle with other calibrations or none, and optionally another name."""
    shutil.copytree(bundle, out)
    changed = change(CalibrationPair.load(out / CALIBRATION_NAME))
    (out / CALIBRATION_NAME).unlink()
    manifest = open_bundle(bundle).manifest
    if changed is not None:
        (out / CALIBRATION_NAME).write_bytes(changed.to_bytes())
    about = manifest["calibration"] if changed else None
    write_manifest(out, {**manifest, "name": name or manifest["name"], "calibration": about})
    return out


def make_folder(folder, images):
    """Write images into class folders, with broken and unrelated files among them."""
    for i, image in enumerate(images):
        target = folder / f"class{i % 3}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target / f"{i:04d}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("not an image")
    Image.new("L", (40, 20), 90).save(folder / "wide.png")
    return folder


def make_traps(folder):
    """Create files that must not be read, such as pipes; returns the expected error of each."""
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    with open(folder / "huge.png", "wb") as file:
        file.truncate(2**40)
    return {
        "pipe.png": "not a regular file",
        "endless.png": "not a regular file",
        "gone.png": "No such file or directory",
        "huge.png": "a file may have at most 16777216 bytes, this one has 1099511627776",
    }


HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None


def encode(image, format, **options):
    out = io.BytesIO()
    if format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    image.save(out, format, **options)
    return out.getvalue()


def png_of(header, *chunks):
    """A PNG of a header's width, height, bits and kind of colours, and chunks (name, content)."""
    every = [(b"IHDR", struct.pack(">IIBBxxx", *header)), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in every
    )


def png_header(width, height):
    """A PNG with a valid header and almost no data."""
    return png_of((width, height, 8, 2), (b"IDAT", zlib.compress(b"\0" * 64)))


def png_with_key(bits, colours, rows, key):
    """A PNG of these rows whose transparent colour is in the chunk tRNS, if it is not ``None``."""
    width = len(rows[0]) * 8 // (bits * {2: 3}.get(colours, 1))
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    keys = [] if key is None else [(b"tRNS", key)]
    return png_of((width, len(rows), bits, colours), *keys, (b"IDAT", data))


def npy(array, **options):
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def b64(data):
    return base64.b64encode(data).decode()


def wait_for(condition, seconds=30.0):
    """Wait until a condition holds; tests on busy machines need a long limit, and rarely wait."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


@contextmanager
def suspended(process):
    """Stop a process until the end of the block, in which it may be killed."""
    process.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


@contextmanager
def held_by_another(path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


@contextmanager
def full_disk(most):
    """Files cannot become larger than so many bytes: neither those of a test nor pytest's own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tool(name):
    """The path of a program; a machine without it skips the test."""
    # Beside this Python first: make does not activate the environment.
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def check_metrics(text):
    """Check metrics by Prometheus's own linter; a machine without it skips the test."""
    command = [tool("promtool"), "check", "metrics"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def npm_install(folder, *packages):
    """Install packages of Node.js below a folder, without their scripts.

    Returns:
        The folder of their programs. The test is skipped without npm or its registry.
    """
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    ping = [npm, "ping", "--fetch-retries=0", "--fetch-timeout=10000"]
    try:
        subprocess.run(ping, capture_output=True, check=True, timeout=30)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("the registry of npm cannot be reached")
    (folder / "package.json").write_text("{}")
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", *packages]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "node_modules" / ".bin"


def is_of_deleted_extension(words):
    """Whether a command of ``ade`` needs an extension that is not there."""
    given = set(words)
    return any(
        given & own for name, own in WORDS_OF_EXTENSIONS.items() if not (FOLDER / name).exists()
    )
