"""The inputs and outputs of the tabs, and what every tab needs to lay itself out."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ade_base.pictures.read import file_size
from serving.engine.bundle import Bundle
from serving.ingest.errors import ApiError
from serving.ingest.picture import Picture, prepare_image
from serving.page.files import FileRefused, read_file
from serving.page.models import RESIZE, Examples, Models, sentence
from serving.page.uploads import CLIENT_BYTES, CLIENT_FILES

KINDS = [("clean", "mean"), ("with noise", "density")]
KINDS_INFO = "Clean: smooth, best to look at. With noise: with the pixel noise of the model."
RESIZE_INFO = "Images of other proportions are cropped to their centre."
NO_IMAGE = "There is no image yet: drop one, or choose an example."
MODEL_ID = re.compile(r"[\w.-]{1,100}@[0-9a-f]{12}")


@dataclass(frozen=True)
class Inbox:
    """The image inputs of the tabs, so that an image can be sent from one tab to another.

    Each tab lays out its own input.
    """

    first: gr.Image
    last: gr.Image
    reconstruct: gr.Image
    score: gr.Image
    compare: gr.Image


@dataclass(frozen=True)
class TabContext:
    """What every tab needs to lay itself out."""

    models: Models
    model: gr.Dropdown  # its value is a name of ``models.bundles``
    tabs: gr.Tabs
    tab: gr.Tab  # the one that is laid out
    shown: gr.Radio  # its value is the name of the tab that the browser shows
    inbox: Inbox
    examples: Examples


def make_inbox() -> Inbox:
    """Make the inputs; none of them is on the page yet."""
    return Inbox(*(image_input(label) for label in ("From", "To", "Image", "Image", "Image")))


def read(path: str | None) -> bytes:
    """Read an uploaded file."""
    if path is None:
        raise gr.Error(NO_IMAGE)
    try:
        return read_file(path)
    except FileRefused as error:
        raise gr.Error(str(error)) from None
    except OSError:
        raise gr.Error(
            "The file is no longer there: the page keeps files for an hour, and of each visitor at "
            f"most {CLIENT_BYTES >> 20} MiB and {CLIENT_FILES:,} files. Drop it again, or run "
            "`ade score`, which takes folders of any size."
        ) from None


def as_seen(data: bytes, bundle: Bundle, resize: bool) -> Picture:
    """The image as a model sees it."""
    image = prepare_image(data, bundle.image_shape, resize)
    if isinstance(image, ApiError):
        raise gr.Error(sentence(image))
    return image


def open_png(data: bytes) -> tuple[np.ndarray, dict[str, str]] | None:
    """Read the pixels and our text of a PNG file; ``None`` if it is not one.

    The caller has checked its :func:`file_size`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.size != file_size(data):  # Pillow takes the last of several headers
                return None
            picture.load()
            return np.asarray(picture), png_text(picture)
    except Exception:  # Pillow raises many types
        return None


def png_text(picture: Image.Image) -> dict[str, str]:
    """The text of a PNG that says how it was made here."""
    return {
        str(key): str(value) for key, value in picture.info.items() if str(key).startswith("ade:")
    }


def made_here(data: bytes, shape: tuple[int, int, int]) -> tuple[np.ndarray, dict[str, str]] | None:
    """Read the pixels, uint8 ``(H, W, C)``, and text of one sample; ``None`` for another shape."""
    opened = open_png(data) if file_size(data) == (shape[1], shape[0]) else None
    if opened is None or opened[0].size != math.prod(shape):
        return None
    return opened[0].reshape(shape), opened[1]


def read_seed(value: float | None) -> int:
    """Read the value of :func:`seed_input`."""
    if value is None:
        raise gr.Error("The seed is empty: it must be a whole number from 0 on.")
    return int(value)


def seed_input(value: int, label: str = "Seed", **options: Any) -> gr.Number:
    """An input for seeds that browsers represent exactly; the API takes larger ones."""
    return gr.Number(value=value, precision=0, minimum=0, maximum=2**53 - 1, label=label, **options)


def slider(minimum: float, maximum: float, **options: Any) -> gr.Slider:
    """A slider whose number box counts as the minimum while it is empty."""
    made = gr.Slider(minimum, maximum, **options)
    checked = made.preprocess
    made.preprocess = lambda payload: checked(minimum if payload is None else payload)  # type: ignore[method-assign]
    return made


def resize_input() -> gr.Checkbox:
    return gr.Checkbox(True, label=RESIZE, info=RESIZE_INFO)


def kind_input() -> gr.Radio:
    return gr.Radio(KINDS, value="mean", label="Kind", info=KINDS_INFO)


def image_input(label: str) -> gr.Image:
    """An image input that passes the file on unchanged; Gradio alone would convert it."""
    image = gr.Image(
        label=label,
        type="filepath",
        format="png",
        sources=["upload", "clipboard", "webcam"],
        height=248,
        elem_classes="ade-pixels",
        alt_text="the chosen image",
        buttons=["fullscreen"],
        render=False,
    )
    # Not a subclass: Gradio writes a stub file beside the source of each one.
    image.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return image


def image_output(label: str, **options: Any) -> gr.Image:
    return gr.Image(
        label=label,
        type="filepath",
        format="png",
        interactive=False,
        alt_text=label,
        buttons=["download", "fullscreen"],
        **{"height": 256, "elem_classes": "ade-pixels", **options},
    )


def image_strip(label: str, **options: Any) -> gr.Image:
    """An output as wide as the page allows, for several images in a row."""
    return image_output(label, height=None, elem_classes="ade-pixels ade-strip", **options)


def image_pair(left: str, right: str) -> gr.ImageSlider:
    """Two images of one size, one over the other, with a slider between them.

    ``page.js`` takes their alternative texts from the label.
    """
    return gr.ImageSlider(
        label=f"{left} and {right}",
        type="filepath",
        format="png",
        interactive=False,
        max_height=340,
        elem_classes="ade-pixels ade-pair",
        buttons=["fullscreen"],
    )


def image_grid(label: str, columns: int, **options: Any) -> gr.Gallery:
    """Square images in rows, of which one can be chosen."""
    return gr.Gallery(
        label=label,
        show_label=False,
        type="filepath",
        format="png",
        interactive=False,
        allow_preview=False,
        columns=columns,
        elem_classes="ade-pixels ade-grid",
        buttons=[],
        **options,
    )


def html(value: str = "", **options: Any) -> gr.HTML:
    """An element of HTML in the page's own style."""
    return gr.HTML(value, apply_default_css=False, js_on_load=None, **options)


def live(value: str = "") -> gr.HTML:
    """An element of HTML whose changes screen readers read out, see ``page.js``."""
    return html(value, elem_classes="ade-live")


def caption(text: str) -> gr.Markdown:
    return gr.Markdown(text, elem_classes="ade-caption")


def examples(context: TabContext, image: gr.Image) -> None:
    """Lay out example images, those that the model's gate knows and drawings; a click fills."""
    drawings = context.examples.drawings
    with gr.Row(elem_classes="ade-examples"):
        known_examples(context, image)
        with gr.Column(min_width=280):
            _fill_on_click(_dataset("Drawings, text, noise", drawings), drawings, image)


def known_examples(
    context: TabContext, image: gr.Image, label: str | None = None, min_width: int = 280
) -> None:
    """Lay out images that the gate of the chosen model knows, if there are any."""
    known = {model: of for model, of in context.examples.known.items() if of[1]}
    if not known:
        return
    shown = {}
    with gr.Column(min_width=min_width):
        for model, (name, files) in known.items():
            is_first = model == context.models.first
            shown[model] = one = _dataset(label or name, files, visible=is_first)
            _fill_on_click(one, files, image)
    # In the browser alone. A single value is given by itself.
    js = f"""(model) => {{
      const update = (name) => ({{ __type__: "update", visible: name === model }});
      const all = {json.dumps(list(shown))}.map(update);
      return all.length > 1 ? all : all[0];
    }}"""
    context.model.change(None, context.model, list(shown.values()), js=js, api_visibility="private")


def _dataset(label: str, files: list[str], visible: bool = True) -> gr.Dataset:
    return gr.Dataset(
        components=[gr.Image(type="filepath", format="png", render=False)],
        samples=[[path] for path in files],
        type="index",
        samples_per_page=len(files),
        label=label,
        visible=visible,
    )


def _fill_on_click(dataset: gr.Dataset, files: list[str], image: gr.Image) -> None:
    # Not gr.Examples, which replaces the image input by one without our preprocess.
    dataset.click(
        lambda i: files[i],
        dataset,
        image,
        show_progress="hidden",
        # By default Gradio drops a click while an earlier one is unanswered.
        trigger_mode="always_last",
        queue=False,
        api_visibility="private",
    ).failure(  # through the queue: Gradio shows no errors of other events
        lambda: None, show_progress="hidden", api_visibility="private"
    )
