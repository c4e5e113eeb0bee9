"""Fixtures: real images, a small checkpoint and bundle, and a running service."""

import contextlib
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

# Before NumPy and PyTorch are loaded, here and in the processes that tests start: the networks are
# too small for a second thread, and idle threads that spin take the core from the services.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from PIL import Image

from ade_model.checkpoint import save_model
from serving.verdict.calibration_file import CalibrationPair
from tests.helpers import DATA, PRETRAINED, make_folder, make_model, with_calibrations

if TYPE_CHECKING:
    pass

# No deadline, which fails on a busy machine, and the same examples in each run.
settings.register_profile("ade", deadline=None, derandomize=True)
settings.load_profile("ade")


@pytest.fixture
def short_path():
    """A temporary folder with a path that is short enough for sockets in it."""
    with tempfile.TemporaryDirectory(prefix="ade-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def real_images():
    """300 test images of CIFAR-10, uint8 ``(300, 32, 32, 3)``."""
    return np.asarray(Image.open(DATA / "cifar10_test_300.webp").convert("RGB")).reshape(
        -1, 32, 32, 3
    )


@pytest.fixture(scope="session")
def small_images(real_images):
    """Corners of real images, uint8 ``(300, 8, 8, 3)``."""
    return np.ascontiguousarray(real_images[:, 12:20, 12:20])


@pytest.fixture(scope="session")
def folder(tmp_path_factory, small_images):
    """A folder of these images to train on, with two files that are broken."""
    return make_folder(tmp_path_factory.mktemp("data") / "images", small_images)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A saved model of a few thousand random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(
        make_model(scale=0.06),
        folder,
        {"recipe": "av-ade", "data": "corners", "splits": {}, "seed": 0, "images_seen": 0},
    )
    return folder


@pytest.fixture(scope="session", autouse=True)
def small_checks():
    """Corrupt 20 images in each way instead of 200: most of what a small calibration costs.

    And compare fewer pixels of an export. In all tests, whichever run before them. A test that
    needs more sets the number itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.gate.pair.CORRUPTED", 20)
        patch.setattr("export.parity.MIN_PIXEL_VALUES", 100_000)
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """A function that returns a folder which the first process of a run to ask for it fills.

    Its arguments are the folder's name and a function that writes to the path it is given.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def made(name, make):
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name).exists():
                make(own / name)
                (own / name).rename(shared / name)
        return shared / name

    return made


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint, small_images, made_once, tmp_path_factory):
    """A bundle of that checkpoint, exported and calibrated by the real code."""
    from export.gate.calibrate import calibrate_bundle
    from export.write import export_bundle

    def make(bundle):
        exported = tmp_path_factory.mktemp("exported") / "bundle"
        export_bundle(tiny_checkpoint, exported, "tiny", small_images[:40], None)
        calibrate_bundle(exported, bundle, small_images[:150], small_images[150:], "corners")

    return made_once("tiny", make)


@pytest.fixture(scope="session")
def large_images(real_images):
    """Real images, enlarged: uint8 ``(120, 40, 60, 3)``."""
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((60, 40))) for image in real_images[:120]]
    )


@pytest.fixture(scope="session")
def seeing_bundle(tiny_bundle, large_images, made_once):
    """That bundle, calibrated on 60 larger pictures, of which an encoder sees the originals."""
    from export.gate.calibrate import calibrate_bundle

    def make(bundle):
        calibrate_bundle(tiny_bundle, bundle, large_images[:24], large_images[24:60], "large")

    return made_once("seeing", make)


@pytest.fixture(scope="session")
def pretrained_engine():
    """An engine of the shipped bundle, for tests that do not change it."""
    from serving.engine.engine import InferenceEngine

    return InferenceEngine(PRETRAINED, device="cpu")


@pytest.fixture(scope="session")
def gate():
    """The shipped bundle's gate, at the usual alpha."""
    from serving.gate import Gate

    return Gate(PRETRAINED, alpha=0.01)


@pytest.fixture(scope="session")
def exact_only(tmp_path_factory):
    """A gate without a calibration for resized images."""
    from serving.gate import Gate

    out = tmp_path_factory.mktemp("bundles") / "exact"
    return Gate(with_calibrations(PRETRAINED, out, lambda both: CalibrationPair(both.exact)))


@pytest.fixture
def traced_before(tiny_bundle, monkeypatch):
    """Let exports of the small checkpoint take the graphs of the bundle that it has already."""

    def take_onnx(graphs, name, example, folder):
        shutil.copy(tiny_bundle / f"{name}.onnx", folder)

    def take_torchscript(graphs, examples, path):
        shutil.copy(tiny_bundle / path.name, path)

    monkeypatch.setattr("export.write.export_onnx", take_onnx)
    monkeypatch.setattr("export.write.export_torchscript", take_torchscript)


class MeanColours(torch.nn.Module):
    """A network whose features are an image's mean colours, over and over."""

    def forward(self, x):
        """From images, ``(N, 3, H, W)``, to as many features as EfficientNet has."""
        return x.mean((2, 3)).repeat(1, 427)[:, :1280]


@pytest.fixture
def mean_colours(monkeypatch):
    """Make encoders, and teach small ones, with mean colours instead of EfficientNet's features.

    Its features take long to compute, and its export takes longer.
    """

    def features(images):
        x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2) / 255
        return MeanColours()(x).double().numpy()

    def teacher(size):
        assert size == 160
        return features

    monkeypatch.setattr("training.encoder.EfficientNetFeatures", lambda: features)
    monkeypatch.setattr("training.encoder.load_efficientnet", MeanColours)
    monkeypatch.setattr("training.distillation.EfficientNetFeatures", teacher)


@pytest.fixture(scope="session")
def service():
    """``ade serve`` with the shipped bundle, shared by all tests that do not change it."""
    from tests.service import RunningService

    running = RunningService(PRETRAINED)
    yield running
    running.stop()


@pytest.fixture(scope="module")  # as long as it is there, its event loop runs
def browser():
    from tests.browsing import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def shared_page(browser, service):
    from tests.browsing import opened

    with opened(browser, service.page) as page:
        yield page


@pytest.fixture
def page(shared_page):
    """The page in a browser, which most tests of a file share: opening one takes seconds.

    Images and files stay in it. A test that changes a setting resets it.
    """
    yield shared_page
    shared_page.unroute_all()
    close = "document.querySelectorAll('[data-testid=toast-close]').forEach((one) => one.click())"
    shared_page.evaluate(close)


@pytest.fixture(scope="session")
def page_processes(service, tmp_path_factory):
    """The page without the API, with a token or without; started when a test first needs it."""
    from tests.running_page import RunningPage

    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(token):
            running = RunningPage(service.url, tmp_path_factory.mktemp("page"), token)
            stack.callback(running.stop)
            return running

        yield start
