"""Examples of the images that calibrated a gate, in its bundle and on its page."""

import gradio as gr
from PIL import Image

from ade_base.pictures.show import write_png
from export.gate.calibrate import calibrate_bundle
from serving.engine.bundle import open_bundle
from serving.page.app import build_page
from serving.page.models import OWN, PHOTOGRAPHS, Models
from tests.helpers import PRETRAINED


def labels(*bundles):
    """Of the examples that the page of some bundles has."""
    page = build_page(Models("http://127.0.0.1:1", [*bundles], None))
    shown = {str(one.label) for one in page.blocks.values() if isinstance(one, gr.Dataset)}
    return shown - {"From, for example", "To, for example"}


def test_a_gate_shows_examples_of_its_own_images(tiny_bundle, small_images, tmp_path, monkeypatch):
    """If their owner agreed; CIFAR-10's photographs only if those calibrated the gate."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "page-files"))
    mine, again = tmp_path / "mine", tmp_path / "again"
    files = [write_png(image.repeat(9, 0).repeat(9, 1), {"by": "me"}) for image in small_images]
    given = (files[:35], [*files[35:80], b"broken"], "mine")
    calibrate_bundle(tiny_bundle, mine, *given, keep_examples=True)
    kept = open_bundle(mine)
    assert kept.examples == [f"example-{i}.png" for i in range(1, 7)]
    for name in kept.examples:
        with Image.open(kept.file(name)) as picture:  # which its manifest lists
            assert picture.size == (32, 32) and picture.info == {}  # four times the model's
    calibrate_bundle(mine, again, *given)
    assert open_bundle(again).examples == [], "they are not of the new calibration"
    drawings = {"Drawings, text, noise"}
    assert labels(open_bundle(PRETRAINED)) == drawings | {PHOTOGRAPHS}
    assert labels(open_bundle(tiny_bundle)) == labels(open_bundle(again)) == drawings
    assert labels(kept) == drawings | {OWN}
    assert labels(open_bundle(PRETRAINED), kept) == drawings | {PHOTOGRAPHS, OWN}
