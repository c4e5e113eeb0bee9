"""The tab *Sample*: draws images by seed, sends them to other tabs, and reproduces them."""

from __future__ import annotations

import io
import math
import secrets
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ade_base.pictures.read import file_size
from ade_base.pictures.show import untile, write_png
from serving.page import reproduce
from serving.page.files import KEPT_S, write_file
from serving.page.served import (
    KINDS,
    KINDS_INFO,
    MODEL_ID,
    Runs,
    Shared,
    ask,
    latest_only,
    png_text,
    read,
    read_seed,
    seed_input,
    slider,
)

MAX_GRID = 64
HISTORY = 24  # number of grids that a session remembers


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
    arrays: dict[str, Any] = {
        name: np.array(texts[0][f"ade:{name}"]) for name in ("seed", "temperature", "kind", "model")
    }
    np.savez_compressed(
        out, images=images, index=np.array([int(text["ade:index"]) for text in texts]), **arrays
    )
    return out.getvalue()


def remember(history: list[Any], grid: str | None) -> Any:
    """Add a grid to the session's grids, without duplicates; the latest comes first."""
    if grid is None:  # while the first samples are drawn
        return gr.skip(), gr.skip()
    data = read(grid)
    if file_size(data) is None:  # any file may be given here, not only what was drawn
        return gr.skip(), gr.skip()
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        text = png_text(picture)
    kinds = {kind for _, kind in KINDS}
    if text.get("ade:kind") not in kinds or not MODEL_ID.fullmatch(text.get("ade:model", "")):
        return gr.skip(), gr.skip()
    settings = (
        text["ade:model"].split("@")[0],
        int(text["ade:n"]),
        int(text["ade:seed"]),
        float(text["ade:temperature"]),
        text["ade:kind"],
    )
    history = [(grid, settings), *(entry for entry in history if entry[1] != settings)][:HISTORY]
    history = [entry for entry in history if Path(entry[0]).exists()]
    return history, [
        (path, f"seed {seed}, {n}, {kind}, {temperature:g}, {model}")
        for path, (model, n, seed, temperature, kind) in history
    ]


def again(history: list[Any], event: gr.SelectData) -> Any:
    """The settings of a chosen grid."""
    if event.index >= len(history):  # the page may still show what is no longer kept
        raise gr.Error(
            "These samples are no longer kept: the page keeps them for an hour. Draw their "
            "seed again."
        )
    return history[event.index][1]


def add_tab(shared: Shared) -> None:
    """Lay the tab out; its first samples are drawn when it is opened."""
    tab = shared.tab
    served, inbox = shared.served, shared.inbox

    def sample(
        model: str, n: float, seed: float, temperature: float, kind: str
    ) -> tuple[list[str], str, str]:
        """Draw samples: PNG files, one PNG file of all, and an npz file."""
        data, used = ask(
            served.clients[model].sample_png,
            n=int(n),
            seed=read_seed(seed),
            temperature=float(temperature),
            kind=kind,
        )
        images, texts = cells(data, served.bundles[model].image_shape)
        paths = [
            write_file(write_png(image, text), f"sample-{used}-{text['ade:index']}.png")
            for image, text in zip(images, texts, strict=True)
        ]
        name = f"samples-{used}-{len(paths)}"
        return (
            paths,
            write_file(data, f"{name}.png"),
            write_file(archive(images, texts), f"{name}.npz"),
        )

    def settle(samples: list[Any] | None, path: str | None) -> Any:
        """Clear the choice among earlier samples and enable the downloads."""
        if not samples:
            return (gr.skip(),) * (len(shown) + len(chosen))
        enabled = gr.DownloadButton(interactive=True)
        columns = math.ceil(math.sqrt(len(samples)))
        if path in [str(sample[0]) for sample in samples]:  # chosen before this ran
            return gr.Gallery(columns=columns), enabled, enabled, *(gr.skip(),) * len(chosen)
        gallery = gr.Gallery(columns=columns, selected_index=None)
        return gallery, enabled, enabled, *choose(None)

    def clear_other_samples(model: str, runs: Runs) -> Any:
        """Clear what another model drew, or is about to draw."""
        runs.chosen = (model,)
        runs.failed = runs.start()  # so that draw_once draws
        empty = gr.DownloadButton(value=None, interactive=False)
        return [], empty, empty, *choose(None)

    def draw_once(samples: list[Any] | None, *values: Any) -> Any:
        """Draw samples when the tab is opened, unless there are some or they are being drawn."""
        runs = values[-1]
        if samples or runs.latest > runs.failed:
            return (gr.skip(),) * len(shown)
        return sampled(*values)

    def draw_if_shown(tab_shown: str, *values: Any) -> Any:
        """Draw samples of a new model at once only if they would be seen."""
        return draw_once(*values) if tab_shown == tab.label else (gr.skip(),) * len(shown)

    def pick(samples: list[Any], event: gr.SelectData) -> Any:
        return choose(str(samples[event.index][0]))

    def choose(path: str | None) -> Any:
        """Remember the chosen sample and enable what can be done with it; or neither."""
        is_chosen = path is not None
        buttons = (gr.Button(interactive=is_chosen) for _ in targets)
        return path, gr.DownloadButton(value=path, interactive=is_chosen), *buttons

    # The pictures are square: their width decides whether what belongs to them is in view.
    with gr.Row():
        with gr.Column(scale=5, min_width=280, elem_classes="ade-settings"):
            kind = gr.Radio(KINDS, value="mean", label="Kind", info=KINDS_INFO)
            n = slider(1, MAX_GRID, value=16, step=1, label="Images")
            with gr.Row(equal_height=True):
                seed = seed_input(
                    7, info="The same seed draws the same images.", scale=3, min_width=120
                )
                repeat = gr.Button("Draw this seed", scale=2, min_width=120)
            with gr.Accordion("More settings", open=False):
                temperature = slider(
                    0.1,
                    1.5,
                    value=1.0,
                    step=0.05,
                    label="Temperature",
                    info="Below 1, samples are more alike and smoother; above 1, more varied.",
                )
        with gr.Column(scale=6, min_width=280):
            handed: Any = {"size": "sm", "min_width": 130, "interactive": False}
            with gr.Row(elem_classes="ade-choice"):
                go = gr.Button("⚄ Draw new samples", variant="primary", size="md", min_width=170)
                gr.Markdown("Click a sample, then:", elem_classes="ade-caption")
                score = gr.Button(
                    "Score it", variant="primary", size="md", min_width=120, interactive=False
                )
                keep = gr.DownloadButton("Download it", size="md", min_width=120, interactive=False)
            gallery = gr.Gallery(
                label="Samples",
                show_label=False,
                type="filepath",
                format="png",
                interactive=False,
                allow_preview=False,
                columns=4,
                elem_classes="ade-pixels ade-grid",
                buttons=[],
            )
            picked = gr.State(time_to_live=KEPT_S)
            with gr.Accordion("More", open=False), gr.Row():
                targets = [
                    (score, "Score", inbox.score),
                    (gr.Button("Reconstruct it", **handed), "Reconstruct", inbox.reconstruct),
                    (gr.Button("Explore from it", **handed), "Explore", inbox.first),
                    (gr.Button("Explore to it", **handed), "Explore", inbox.last),
                ]
                if len(served.bundles) > 1:
                    compare = gr.Button("Compare models on it", **handed)
                    targets.append((compare, "Compare", inbox.compare))
                png = gr.DownloadButton("Download all (PNG)", **handed)
                npz = gr.DownloadButton("Download all (npz)", **handed)
            for button, to, image in targets:
                button.click(
                    lambda path, to=to: hand_on(path, to),
                    picked,
                    [image, shared.tabs],
                    show_progress="hidden",
                    api_visibility="private",
                )
    with gr.Accordion("Earlier samples of this session", open=False):
        gr.Markdown("Click a set to draw it again.", elem_classes="ade-caption")
        history = gr.State([], time_to_live=KEPT_S)
        past = gr.Gallery(
            label="Earlier samples of this session",
            show_label=False,
            type="filepath",
            format="png",
            interactive=False,
            allow_preview=False,
            columns=6,
            fit_columns=False,
            elem_classes="ade-pixels ade-grid",
            buttons=[],
        )
    with gr.Accordion("Reproduce: how was this PNG made?", open=False):
        reproduce.add_part(shared)
    settings: list[Any] = [shared.model, n, seed, temperature, kind]
    shown = [gallery, png, npz]
    chosen: list[Any] = [picked, keep, *(button for button, _, _ in targets)]
    runs = gr.State(Runs())
    sampled = latest_only(sample, len(shown), of=[0])

    # Each of these draws, also while samples are drawn: they are of the settings that are shown.
    busy: dict[str, Any] = {"show_progress_on": gallery}
    private: Any = {**busy, "api_visibility": "private"}
    asked = repeat.click(
        sampled, [*settings, runs], shown, api_name="sample", trigger_mode="multiple", **busy
    )
    entered = seed.submit(sampled, [*settings, runs], shown, trigger_mode="multiple", **private)
    opened = tab.select(
        draw_once, [gallery, *settings, runs], shown, trigger_mode="multiple", **private
    )
    rolled = go.click(
        lambda: secrets.randbelow(2**31),
        None,
        seed,
        trigger_mode="multiple",
        api_visibility="private",
    ).then(sampled, [*settings, runs], shown, trigger_mode="multiple", **private)
    recalled = past.select(
        again, history, settings, trigger_mode="multiple", api_visibility="private"
    ).success(sampled, [*settings, runs], shown, trigger_mode="multiple", **private)
    changed = kind.input(sampled, [*settings, runs], shown, trigger_mode="multiple", **private)
    emptied = shared.model.change(
        clear_other_samples,
        [shared.model, runs],
        [*shown, *chosen],
        show_progress="hidden",
        queue=False,
        api_visibility="private",
    )
    redrawn = emptied.then(
        draw_if_shown,
        [shared.shown, gallery, *settings, runs],
        shown,
        trigger_mode="multiple",
        **private,
    )
    for made in (asked, entered, opened, rolled, recalled, changed, redrawn):
        made.success(
            remember,
            [history, png],
            [history, past],
            show_progress="hidden",
            api_visibility="private",
        )
    # One after another, so that none undoes a choice that came after it.
    in_order: dict[str, Any] = {"concurrency_id": "choice", "concurrency_limit": 1}
    gallery.change(
        settle,
        [gallery, picked],
        [*shown, *chosen],
        show_progress="hidden",
        trigger_mode="always_last",
        api_visibility="private",
        **in_order,
    )
    gallery.select(
        pick,
        gallery,
        chosen,
        show_progress="hidden",
        trigger_mode="multiple",  # the gallery marks each click
        api_visibility="private",
        **in_order,
    )


def hand_on(path: str | None, tab: str) -> tuple[str, Any]:
    """Send a sample to another tab and show that tab."""
    if path is None:
        raise gr.Error(
            "No sample is chosen, or it is no longer kept: click one, or draw the seed again."
        )
    return path, gr.Tabs(selected=tab)
