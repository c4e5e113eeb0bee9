"""What the page's tabs share: the models that are served, how they are asked, and what an error looks like."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import numpy as np

from serving.bundle import CALIBRATION_NAME, Bundle
from serving.client import AdeClient, AdeError
from serving.images import ImageError, read_image
from serving.ood import Calibration

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.png"))
KINDS = [("mean: f⁻¹(μ(z)), what the discriminator saw", "mean"),
         ("density: f⁻¹(μ(z) + σε), what the likelihood describes", "density")]


class Served:
    """The models of one service.

    Args:
        url: of the inference address.
        bundles: that are served, the first under the plain names; only their manifests and calibrations are read.
        token: where the service asks for one.
    """

    def __init__(self, url: str, bundles: list[Bundle], token: str | None) -> None:
        self.url = url
        self.bundles = {bundle.name: bundle for bundle in bundles}
        self.clients = {bundle.name: AdeClient(url, model=bundle.name if i else None, token=token)
                        for i, bundle in enumerate(bundles)}
        self.calibrations = {bundle.name: Calibration.load(bundle.file(CALIBRATION_NAME))
                             for bundle in bundles if bundle.has(CALIBRATION_NAME)}

    @property
    def first(self) -> str:
        return next(iter(self.bundles))

    def is_ready(self) -> bool:
        """Whether all four operations of every model answer."""
        return all(client.is_ready() for client in self.clients.values())


def ask(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A call of the client; what the API answers as an error is shown as a sentence."""
    try:
        return call(*args, **options)
    except AdeError as error:
        raise gr.Error(sentence(error)) from None
    except httpx.TransportError:
        raise gr.Error("The service does not answer. It may be starting or stopping: try again.") from None


def sentence(error: AdeError) -> str:
    return error.message[:1].upper() + error.message[1:] + "."


def usable(result: Any) -> Any:
    """A result of one image, if it is none, as an error on the page."""
    if isinstance(result, AdeError):
        raise gr.Error(sentence(result))
    return result


def read(path: str | None) -> np.ndarray:
    """The pixels of a file that was dropped."""
    if path is None:
        raise gr.Error("There is no image yet: drop one, or choose an example.")
    try:
        return read_image(Path(path).read_bytes()).pixels
    except ImageError as error:
        raise gr.Error(str(error)) from None


def file(data: bytes, name: str) -> str:
    """A file for the page to show; Gradio serves it as it is, text keys included."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")))
    (folder / name).write_bytes(data)
    return str(folder / name)


def image_input(label: str = "Image") -> gr.Image:
    return gr.Image(label=label, type="filepath", format="png", sources=["upload", "clipboard"], height=256,
                    elem_classes="ade-pixels")


def image_output(label: str, **options: Any) -> gr.Image:
    return gr.Image(label=label, type="filepath", format="png", interactive=False, elem_classes="ade-pixels",
                    buttons=["download", "fullscreen"], **{"height": 256, **options})


def examples(image: gr.Image) -> None:
    if EXAMPLES:
        gr.Examples([[str(path)] for path in EXAMPLES], [image], examples_per_page=12, label="Examples")
