"""*Reproduce*, a part of the tab *Sample*: makes a picture again by the text in its file."""

from __future__ import annotations

import io
import math
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ade_base.pictures.read import MAX_PIXELS, file_size
from serving.page.files import write_file
from serving.page.inputs import MODEL_ID, TabContext, image_output, open_png, read
from serving.page.models import Models, ask
from serving.page.runs import QUIET, Runs, latest_only

CHANGED = "The model or the picture was just changed: press the button again."
KEYS = ("ade:seed", "ade:index", "ade:n", "ade:kind", "ade:temperature")


def read_text(path: str | None) -> tuple[np.ndarray, dict[str, str]]:
    """Read the pixels and text of a PNG that a sampler of ours made."""
    if path is None:
        raise gr.Error("There is no picture yet: drop a PNG that was made here.")
    data = read(path)
    size = file_size(data)
    if size is None:
        raise gr.Error("This is not a PNG file.")
    width, height = size
    if width * height > MAX_PIXELS:
        raise gr.Error(
            f"This picture has {width} × {height} pixels, more than any that is made here."
        )
    opened = open_png(data)
    if opened is None:
        raise gr.Error("This is not a PNG file.")
    pixels, text = opened
    if "ade:from" in text:
        raise gr.Error(
            "This picture was decoded from latents, which it does not carry: its text is not "
            "enough."
        )
    missing = [key for key in KEYS if key not in text]
    if missing:
        raise gr.Error(
            f"This PNG does not say how it was made ({', '.join(missing)} missing): it was not "
            "made here, or it lost its text when it was edited or converted."
        )
    return pixels, text


def settings_of(text: dict[str, str]) -> dict[str, Any]:
    """The parameters of the sample operation in a picture's text."""
    try:
        temperature = float(text["ade:temperature"])
        if not math.isfinite(temperature):
            raise ValueError(temperature)
        n, seed, index = (int(text[f"ade:{name}"]) for name in ("n", "seed", "index"))
    except ValueError:
        raise gr.Error("The picture's text is damaged: its numbers are invalid.") from None
    return {
        "n": n,
        "seed": seed,
        "index": index,
        "temperature": temperature,
        "kind": text["ade:kind"],
    }


class Reproduce:
    """The part of the tab."""

    def __init__(self, context: TabContext) -> None:
        self.models: Models = context.models
        with gr.Row():
            with gr.Column(scale=1, min_width=240):
                picture = gr.File(label="A PNG that was made here", file_types=[".png"], height=160)
                go = gr.Button("Make it again")
            with gr.Column(scale=2, min_width=240):
                again = image_output("Made again", height="min(384px, 80vw)")
                said = gr.Markdown(elem_classes="ade-live")
        chosen: list[Any] = [context.model, picture]
        given, results = [*chosen, gr.State(Runs())], [again, said]
        go.click(
            latest_only(self.reproduce, 2, of=range(2), changed=CHANGED),
            given,
            results,
            api_name="reproduce",
            show_progress_on=again,
            trigger_mode="multiple",
        )
        gr.on([one.change for one in chosen], clear, given, results, queue=False, **QUIET)

    def reproduce(self, model: str, picture: str | None) -> tuple[str, str]:
        """Make the picture again, and compare."""
        pixels, text = read_text(picture)
        settings, own = settings_of(text), self.models.bundles[model].model_id
        data, _ = ask(self.models.clients[model].sample_png, **settings)
        made_by = text.get("ade:model", "")
        if not MODEL_ID.fullmatch(made_by):  # it is shown as Markdown, but may be from anybody
            made_by = "an unknown model"
        if np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels):
            said = "**The same picture, pixel for pixel.**"
        elif made_by != own:
            said = f"**Another picture**: it was made by {made_by}, and this model is {own}."
        else:
            said = (
                "**Not the same**: the picture was changed after it was made, or made on another "
                "kind of device."
            )
        listed = ", ".join(f"{name} {value}" for name, value in settings.items())
        return write_file(data, "again.png"), f"{said}\n\n{listed}"


def clear(*values: Any) -> tuple[None, str]:
    """Clear what is of another picture or model; a run that lasts is of that, too."""
    *chosen, runs = values
    runs.start()
    runs.chosen = tuple(chosen)
    return None, ""
