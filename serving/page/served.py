"""What the page's tabs share: the models that are served, how they are asked, and what an error
looks like.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import numpy as np
from PIL import Image

from serving.api.errors import ApiError
from serving.api.requests import InputImage, prepare_image
from serving.client import AdeClient, AdeError
from serving.engine.bundle import CALIBRATION_NAME, Bundle
from serving.images import file_size
from serving.page.files import FileRefused, read_file
from serving.verdict.calibration import Calibrations

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.png"))
KINDS = [
    ("mean: f⁻¹(μ(z)), the cleaner pictures", "mean"),
    ("density: f⁻¹(μ(z) + σε), what the likelihood describes", "density"),
]


class Served:
    """The models of one service.

    Args:
        url: of the inference address.
        bundles: that are served, the first under the plain names; only their manifests and
            calibrations are read.
        token: where the service asks for one.
    """

    def __init__(self, url: str, bundles: list[Bundle], token: str | None) -> None:
        self.url = url
        self.bundles = {bundle.name: bundle for bundle in bundles}
        self.clients = {
            bundle.name: AdeClient(url, model=bundle.name if i else None, token=token)
            for i, bundle in enumerate(bundles)
        }
        self.calibrations = {
            bundle.name: Calibrations.load(bundle.file(CALIBRATION_NAME))
            if bundle.has(CALIBRATION_NAME)
            else Calibrations()
            for bundle in bundles
        }

    @property
    def first(self) -> str:
        return next(iter(self.bundles))

    @property
    def most_levels(self) -> int:
        """Latent levels of the model that has most of them."""
        return max(len(bundle.latent_shapes) for bundle in self.bundles.values())

    def is_ready(self) -> bool:
        """Whether all four operations of every model answer."""
        return all(client.is_ready() for client in self.clients.values())


@dataclass(frozen=True)
class Inbox:
    """The images that tabs start from, each laid out by its own tab: an image can be handed from
    one tab to another.
    """

    first: gr.Image
    last: gr.Image
    reconstruct: gr.Image
    score: gr.Image
    compare: gr.Image


@dataclass(frozen=True)
class Shared:
    """What a tab is laid out with."""

    served: Served
    model: gr.Dropdown  # its value is a name of ``served.bundles``
    tabs: gr.Tabs
    inbox: Inbox


def make_inbox() -> Inbox:
    """Nothing of it is on the page yet."""
    return Inbox(*(image_input(label) for label in ("From", "To", "Image", "Image", "Image")))


def ask(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A call of the client; what the API answers as an error is shown as a sentence."""
    try:
        return call(*args, **options)
    except AdeError as error:
        raise gr.Error(sentence(error)) from None
    except httpx.TransportError:
        raise gr.Error(
            "The service does not answer. It may be starting or stopping: try again."
        ) from None


def sentence(error: AdeError | ApiError) -> str:
    """An error of the API in the page's words."""
    message = error.message.replace(
        '"resize": "fit" resizes them', 'tick "Resize other sizes to fit" to resize them'
    )
    return message[:1].upper() + message[1:] + "."


def usable(result: Any) -> Any:
    """A result of one image, if it is none, as an error on the page."""
    if isinstance(result, AdeError):
        raise gr.Error(sentence(result))
    return result


def read(path: str | None) -> bytes:
    """A file that was dropped."""
    if path is None:
        raise gr.Error("There is no image yet: drop one, or choose an example.")
    try:
        return read_file(path)
    except FileRefused as error:
        raise gr.Error(str(error)) from None
    except OSError:
        raise gr.Error(
            "The file is no longer there: the page keeps files for an hour. Drop it again."
        ) from None


def read_seed(value: float | None) -> int:
    """What a field of :func:`seed_input` holds."""
    if value is None:
        raise gr.Error("The seed is empty: it must be a whole number from 0 on.")
    return int(value)


def seed_input(value: int, label: str = "Seed", **options: Any) -> gr.Number:
    """Seeds that the browser's numbers hold exactly; the API takes larger ones."""
    return gr.Number(value=value, precision=0, minimum=0, maximum=2**53 - 1, label=label, **options)


def resize_input(served: Served) -> gr.Checkbox:
    """Ticked where a verdict was calibrated for images that were resized: those of its user are of
    many sizes.
    """
    ticked = any(calibrations.resized is not None for calibrations in served.calibrations.values())
    return gr.Checkbox(ticked, label="Resize other sizes to fit")


def as_seen(data: bytes, bundle: Bundle, resize: bool) -> InputImage:
    """What a model sees of a file."""
    image = prepare_image(data, bundle.image_shape, resize, 0)
    if isinstance(image, ApiError):
        raise gr.Error(sentence(image))
    return image


def open_png(data: bytes) -> tuple[np.ndarray, dict[str, str]] | None:
    """Pixels, as they are, and our text of a PNG file, whose :func:`file_size` was checked;
    ``None`` if it is not one.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.size != file_size(data):  # Pillow takes the last of several headers
                return None
            picture.load()
            text = {
                str(key): str(value)
                for key, value in picture.info.items()
                if str(key).startswith("ade:")
            }
            return np.asarray(picture), text
    except Exception:  # whatever Pillow stumbles over
        return None


def made_here(data: bytes, shape: tuple[int, int, int]) -> tuple[np.ndarray, dict[str, str]] | None:
    """Pixels, uint8 ``(H, W, C)``, and text of a single sample as a PNG; ``None`` if it is not of
    this shape.
    """
    found = open_png(data) if file_size(data) == (shape[1], shape[0]) else None
    if found is None or found[0].size != math.prod(shape):
        return None
    return found[0].reshape(shape), found[1]


def image_input(label: str) -> gr.Image:
    """Where an image is dropped; its file is handed on as it came: Gradio by itself would convert
    and write it anew.
    """
    image = gr.Image(
        label=label,
        type="filepath",
        format="png",
        sources=["upload", "clipboard", "webcam"],
        height=256,
        elem_classes="ade-pixels",
        render=False,
    )
    # Not a subclass: of each one Gradio writes a stub file beside the source.
    image.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return image


def image_output(label: str, **options: Any) -> gr.Image:
    return gr.Image(
        label=label,
        type="filepath",
        format="png",
        interactive=False,
        elem_classes="ade-pixels",
        buttons=["download", "fullscreen"],
        **{"height": 256, **options},
    )


def examples(image: gr.Image, served: Served) -> None:
    """Example pictures, if a model takes pictures of their size."""
    sizes = {bundle.image_shape[:2] for bundle in served.bundles.values()}
    shown = [path for path in EXAMPLES if (file_size(path) or (0, 0))[::-1] in sizes]
    if shown:
        gr.Examples(
            [[str(path)] for path in shown], [image], examples_per_page=12, label="Examples"
        )
