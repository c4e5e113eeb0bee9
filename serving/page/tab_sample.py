"""The tab *Sample*: draws images by seed, sends them to other tabs, and reproduces them."""

from __future__ import annotations

import io
import math
import secrets
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ade_base.pictures.show import untile, write_png
from serving.page import history
from serving.page.files import KEPT_S, write_file
from serving.page.inputs import (
    TabContext,
    caption,
    image_grid,
    kind_input,
    png_text,
    read_seed,
    seed_input,
    slider,
)
from serving.page.models import ask
from serving.page.reproduce import Reproduce
from serving.page.runs import PRIVATE, QUIET, Runs, latest_only, skipped

MAX_GRID = 64


def cells(grid: bytes, shape: tuple[int, int, int]) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Split a PNG grid into its samples, each with the PNG text that reproduces it.

    Args:
        grid: the PNG file that ``sample`` answered.
        shape: ``(H, W, C)`` of a sample.

    Returns:
        uint8 ``(n, H, W, C)``, and one dictionary per sample.
    """
    with Image.open(io.BytesIO(grid)) as picture:
        text = png_text(picture)
        images = untile(np.asarray(picture), int(text["ade:n"]), shape)
    first = int(text["ade:index"])
    return images, [{**text, "ade:index": str(first + i), "ade:n": "1"} for i in range(len(images))]


def archive(images: np.ndarray, texts: list[dict[str, str]]) -> bytes:
    """An ``.npz`` of ``images``, their ``index``, and the parameters that they share."""
    out = io.BytesIO()
    shared: dict[str, Any] = {
        name: np.array(texts[0][f"ade:{name}"]) for name in ("seed", "temperature", "kind", "model")
    }
    index = np.array([int(text["ade:index"]) for text in texts])
    np.savez_compressed(out, images=images, index=index, **shared)
    return out.getvalue()


def hand_on(path: str | None, tab: str) -> tuple[str, Any]:
    """Send a sample to another tab and show that tab."""
    if path is None:
        raise gr.Error(
            "No sample is chosen, or it is no longer kept: click one, or draw the seed again."
        )
    return path, gr.Tabs(selected=tab)


class SampleTab:
    """The tab; its first samples are drawn when it is opened."""

    def __init__(self, context: TabContext) -> None:
        self.models, self.name = context.models, str(context.tab.label)
        # The pictures are square: their width decides whether what belongs to them is in view.
        with gr.Row():
            self._lay_out_settings(context)
            self._lay_out_samples(context)
        self.history = history.lay_out()
        with gr.Accordion("Reproduce: how was this PNG made?", open=False):
            Reproduce(context)
        self.runs = gr.State(Runs())
        self.sampled = latest_only(self.sample, len(self.outputs), of=[0])
        self._draw_on_events(context)
        self._follow_choice()

    def sample(
        self, model: str, n: float, seed: float, temperature: float, kind: str
    ) -> tuple[list[str], str, str]:
        """Draw samples: PNG files, one PNG file of all, and an npz file."""
        data, used = ask(
            self.models.clients[model].sample_png,
            n=int(n),
            seed=read_seed(seed),
            temperature=float(temperature),
            kind=kind,
        )
        images, texts = cells(data, self.models.bundles[model].image_shape)
        paths = [
            write_file(write_png(image, text), f"sample-{used}-{text['ade:index']}.png")
            for image, text in zip(images, texts, strict=True)
        ]
        name = f"samples-{used}-{len(paths)}"
        whole, arrays = write_file(data, f"{name}.png"), archive(images, texts)
        return paths, whole, write_file(arrays, f"{name}.npz")

    def settle(self, samples: list[Any] | None, path: str | None) -> Any:
        """Clear the choice among earlier samples and enable the downloads."""
        if not samples:
            return skipped(len(self.outputs) + len(self.choice))
        enabled = gr.DownloadButton(interactive=True)
        columns = math.ceil(math.sqrt(len(samples)))
        if path in [str(sample[0]) for sample in samples]:  # chosen before this ran
            return gr.Gallery(columns=columns), enabled, enabled, *skipped(len(self.choice))
        gallery = gr.Gallery(columns=columns, selected_index=None)
        return gallery, enabled, enabled, *self.choose(None)

    def clear_other_samples(self, model: str, runs: Runs) -> Any:
        """Clear what another model drew, or is about to draw."""
        runs.chosen = (model,)
        runs.failed = runs.start()  # so that draw_once draws
        empty = gr.DownloadButton(value=None, interactive=False)
        return [], empty, empty, *self.choose(None)

    def draw_once(self, samples: list[Any] | None, *values: Any) -> Any:
        """Draw samples when the tab is opened, unless there are some or they are being drawn."""
        runs = values[-1]
        if samples or runs.latest > runs.failed:
            return skipped(len(self.outputs))
        return self.sampled(*values)

    def draw_if_shown(self, tab_shown: str, *values: Any) -> Any:
        """Draw samples of a new model at once only if they would be seen."""
        return self.draw_once(*values) if tab_shown == self.name else skipped(len(self.outputs))

    def pick(self, samples: list[Any], event: gr.SelectData) -> Any:
        return self.choose(str(samples[event.index][0]))

    def choose(self, path: str | None) -> Any:
        """Remember the chosen sample and enable what can be done with it; or neither."""
        is_chosen = path is not None
        buttons = (gr.Button(interactive=is_chosen) for _ in self.choice[2:])
        return path, gr.DownloadButton(value=path, interactive=is_chosen), *buttons

    def _lay_out_settings(self, context: TabContext) -> None:
        with gr.Column(scale=5, min_width=280, elem_classes="ade-settings"):
            self.kind = kind_input()
            n = slider(1, MAX_GRID, value=16, step=1, label="Images")
            with gr.Row(equal_height=True):
                info = "The same seed draws the same images."
                self.seed = seed_input(7, info=info, scale=3, min_width=120)
                self.repeat = gr.Button("Draw this seed", scale=2, min_width=120)
            with gr.Accordion("More settings", open=False):
                temperature = slider(
                    0.1,
                    1.5,
                    value=1.0,
                    step=0.05,
                    label="Temperature",
                    info="Below 1, samples are more alike and smoother; above 1, more varied.",
                )
        self.settings: list[Any] = [context.model, n, self.seed, temperature, self.kind]

    def _lay_out_samples(self, context: TabContext) -> None:
        inbox = context.inbox
        near: Any = {"size": "md", "min_width": 120, "interactive": False}
        far: Any = {"size": "sm", "min_width": 130, "interactive": False}
        with gr.Column(scale=6, min_width=280):
            with gr.Row(elem_classes="ade-choice"):
                self.go = gr.Button(
                    "⚄ Draw new samples", variant="primary", size="md", min_width=170
                )
                caption("Click a sample, then:")
                score = gr.Button("Score it", variant="primary", **near)
                keep = gr.DownloadButton("Download it", **near)
            self.gallery = image_grid("Samples", 4)
            picked = gr.State(time_to_live=KEPT_S)
            with gr.Accordion("More", open=False), gr.Row():
                targets = [
                    (score, "Score", inbox.score),
                    (gr.Button("Reconstruct it", **far), "Reconstruct", inbox.reconstruct),
                    (gr.Button("Explore from it", **far), "Explore", inbox.first),
                    (gr.Button("Explore to it", **far), "Explore", inbox.last),
                ]
                if len(self.models.bundles) > 1:
                    compare = gr.Button("Compare models on it", **far)
                    targets.append((compare, "Compare", inbox.compare))
                png = gr.DownloadButton("Download all (PNG)", **far)
                npz = gr.DownloadButton("Download all (npz)", **far)
            for button, to, image in targets:
                button.click(
                    lambda path, to=to: hand_on(path, to), picked, [image, context.tabs], **QUIET
                )
        self.outputs: list[Any] = [self.gallery, png, npz]
        self.choice: list[Any] = [picked, keep, *(button for button, _, _ in targets)]

    def _draw_on_events(self, context: TabContext) -> None:
        # Each of these draws, also while samples are drawn: they are of the settings that are
        # shown.
        draw: Any = {"trigger_mode": "multiple", "show_progress_on": self.gallery}
        given, shown, model = [*self.settings, self.runs], self.outputs, context.model
        each: Any = {"trigger_mode": "multiple", **PRIVATE}
        roll = self.go.click(lambda: secrets.randbelow(2**31), None, self.seed, **each)
        grids, past = self.history
        recall = past.select(history.again, grids, self.settings, **each)
        empty = model.change(
            self.clear_other_samples,
            [model, self.runs],
            [*shown, *self.choice],
            queue=False,
            **QUIET,
        )
        opened = context.tab.select
        for made in (
            self.repeat.click(self.sampled, given, shown, api_name="sample", **draw),
            self.seed.submit(self.sampled, given, shown, **draw, **PRIVATE),
            opened(self.draw_once, [self.gallery, *given], shown, **draw, **PRIVATE),
            roll.then(self.sampled, given, shown, **draw, **PRIVATE),
            recall.success(self.sampled, given, shown, **draw, **PRIVATE),
            self.kind.input(self.sampled, given, shown, **draw, **PRIVATE),
            empty.then(
                self.draw_if_shown,
                [context.shown, self.gallery, *given],
                shown,
                **draw,
                **PRIVATE,
            ),
        ):
            made.success(history.remember, [grids, shown[1]], [grids, past], **QUIET)

    def _follow_choice(self) -> None:
        # One after another, so that none undoes a choice that came after it.
        in_order: Any = {"concurrency_id": "choice", "concurrency_limit": 1, **QUIET}
        self.gallery.change(
            self.settle,
            [self.gallery, self.choice[0]],
            [*self.outputs, *self.choice],
            trigger_mode="always_last",
            **in_order,
        )
        self.gallery.select(
            self.pick,
            self.gallery,
            self.choice,
            trigger_mode="multiple",  # the gallery marks each click
            **in_order,
        )
