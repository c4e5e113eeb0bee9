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
from serving.page.served import (
    MODEL_ID,
    Runs,
    Shared,
    ask,
    image_output,
    latest_only,
    open_png,
    read,
)

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
    found = open_png(data)
    if found is None:
        raise gr.Error("This is not a PNG file.")
    pixels, text = found
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


def add_part(shared: Shared) -> None:
    """Lay the part out."""
    served = shared.served

    def reproduce(model: str, picture: str | None) -> tuple[str, str]:
        """Make the picture again, and compare."""
        pixels, text = read_text(picture)
        bundle = served.bundles[model]
        try:
            temperature = float(text["ade:temperature"])
            if not math.isfinite(temperature):
                raise ValueError(temperature)
            wanted = {
                "n": int(text["ade:n"]),
                "seed": int(text["ade:seed"]),
                "index": int(text["ade:index"]),
                "temperature": temperature,
                "kind": text["ade:kind"],
            }
        except ValueError:
            raise gr.Error("The picture's text is damaged: its numbers are invalid.") from None
        data, _ = ask(served.clients[model].sample_png, **wanted)
        same = np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
        made_by = text.get("ade:model", "")
        if not MODEL_ID.fullmatch(made_by):  # it is shown as Markdown, but may be from anybody
            made_by = "an unknown model"
        if same:
            said = "**The same picture, pixel for pixel.**"
        elif made_by != bundle.model_id:
            said = (
                f"**Another picture**: it was made by {made_by}, and this model is "
                f"{bundle.model_id}."
            )
        else:
            said = (
                "**Not the same**: the picture was changed after it was made, or made on another "
                "kind of device."
            )
        told = ", ".join(f"{name} {value}" for name, value in wanted.items())
        return write_file(data, "again.png"), f"{said}\n\n{told}"

    def clear(*values: Any) -> tuple[None, str]:
        *chosen, runs = values
        runs.start()  # what still runs is of another picture or model
        runs.chosen = tuple(chosen)
        return None, ""

    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            picture = gr.File(label="A PNG that was made here", file_types=[".png"], height=160)
            go = gr.Button("Make it again")
        with gr.Column(scale=2, min_width=240):
            again = image_output("Made again", height="min(384px, 80vw)")
            said = gr.Markdown(elem_classes="ade-live")
    runs = gr.State(Runs())
    go.click(
        latest_only(reproduce, 2, of=range(2), changed=CHANGED),
        [shared.model, picture, runs],
        [again, said],
        api_name="reproduce",
        show_progress_on=again,
        trigger_mode="multiple",
    )
    gr.on(
        [picture.change, shared.model.change],
        clear,
        [shared.model, picture, runs],
        [again, said],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
