"""The tab *Explore*: interpolates between images, and shows what each level of latents holds."""

from __future__ import annotations

import io
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ade_base.pictures.show import tile, write_png
from ade_client.client import AdeClient
from ade_client.contract import MAX_SEED, MAX_TEMPERATURE
from serving.api.latents import between, exchanged, from_coarsest, with_level
from serving.engine.bundle import Bundle
from serving.engine.noise import NoiseStream, sample_key
from serving.page.charts import empty
from serving.page.files import KEPT_S, write_file
from serving.page.inputs import (
    TabContext,
    caption,
    image_output,
    image_strip,
    known_examples,
    live,
    made_here,
    read,
    read_seed,
    resize_input,
    seed_input,
    slider,
)
from serving.page.models import ask
from serving.page.runs import PRIVATE, QUIET, Runs, latest_only, run_on_new_image

FRAME_MS = 120
FRAME_SCALE = 4
STEPS = 9
VARIATIONS = 8
EMPTY = "The interpolation appears here: on each side, choose an example or drop an image."


def noise_of(data: bytes, client: AdeClient, bundle: Bundle, resize: bool) -> list[np.ndarray]:
    """Find the noise that samples an image, one array ``(1, c, h, w)`` per level.

    For a mean sample of this model the seed in its text gives the noise. Any other image is
    encoded, and its noise gives the reconstruction.
    """
    noise = _noise_of_sample(data, client, bundle)
    return list(ask(client.encode, [data], resize=resize, eps=True).eps) if noise is None else noise


def _noise_of_sample(data: bytes, client: AdeClient, bundle: Bundle) -> list[np.ndarray] | None:
    """The noise of a sample; ``None`` unless its text reproduces it pixel for pixel.

    A text can be copied from another picture or changed.
    """
    made = made_here(data, bundle.image_shape)
    if made is None:
        return None
    pixels, text = made
    if text.get("ade:model") != bundle.model_id or text.get("ade:kind") != "mean":
        return None
    try:
        seed, index = int(text["ade:seed"]), int(text["ade:index"])
        temperature = float(text["ade:temperature"])
    except (KeyError, ValueError):
        return None
    if not (
        0 <= seed <= MAX_SEED and 0 <= index <= MAX_SEED and 0 < temperature <= MAX_TEMPERATURE
    ):
        return None
    stream = NoiseStream(sample_key(seed, index))
    noise = [
        (stream.normal(shape) * np.float32(temperature))[None] for shape in bundle.latent_shapes
    ]
    return noise if np.array_equal(ask(client.sample_with, noise)[0], pixels) else None


def animation(frames: np.ndarray) -> bytes:
    """Animate uint8 ``(N, H, W, C)`` forwards and backwards: lossless WebP, enlarged unsmoothed."""
    enlarged = frames.repeat(FRAME_SCALE, axis=1).repeat(FRAME_SCALE, axis=2)
    first, *rest = [
        Image.fromarray(one[:, :, 0] if one.shape[2] == 1 else one).convert("RGB")
        for one in [*enlarged, *enlarged[-2:0:-1]]
    ]
    out = io.BytesIO()
    first.save(
        out, "WEBP", save_all=True, append_images=rest, duration=FRAME_MS, loop=0, lossless=True
    )
    return out.getvalue()


def frame_at(at: float | None, walk: list[str] | None) -> Any:
    """The interpolated image at a place."""
    if not walk:
        raise gr.Error(
            "The steps are no longer kept: the page keeps them for an hour. Press Explore."
        )
    return walk[int(at)] if at is not None and 0 <= at < len(walk) else gr.skip()


def _strip(pictures: np.ndarray, name: str) -> str:
    return write_file(write_png(tile(pictures, len(pictures))), name)


class ExploreTab:
    """The tab; when it is opened, it draws the images that are missing."""

    def __init__(self, context: TabContext) -> None:
        self.models = context.models
        self.ends = [context.inbox.first, context.inbox.last]
        with gr.Row():
            self._lay_out_ends(context)
            self._lay_out_steps()
        with gr.Accordion("What coarse and fine levels hold", open=False):
            caption(
                "Each picture has the fine levels of the second image and more and more of the "
                "coarse levels of the first: none, one, … all."
            )
            self.exchange = image_strip("Fine levels of the second, coarse levels of the first")
        with gr.Accordion("The first image, level by level", open=False):
            self._lay_out_levels()
        self._listen(context)

    def draw(self, model: str, seed: float | None) -> str:
        """Draw one sample, as the first or the last image."""
        data, used = ask(self.models.clients[model].sample_png, n=1, seed=read_seed(seed))
        return write_file(data, f"seed-{used}.png")

    def first_ends(
        self, model: str, first: str | None, last: str | None, seed: float, last_seed: float
    ) -> Any:
        """Samples for missing end points when the tab is opened."""
        ends = ((first, seed), (last, last_seed))
        return tuple(None if end else self.draw(model, seed) for end, seed in ends)

    def explore(
        self, model: str, first: str, last: str, steps: float, resize: bool
    ) -> tuple[Any, str, str, str, str, list[str], str]:
        """Interpolate: one position, an animation, a strip, and images with exchanged levels."""
        client, bundle = self.models.clients[model], self.models.bundles[model]
        a, b = (noise_of(data, client, bundle, resize) for data in (read(first), read(last)))
        frames = ask(client.sample_with, between(a, b, int(steps)))
        levels = ask(client.sample_with, exchanged(a, b))
        middle = len(frames) // 2
        paths = [write_file(write_png(frame), f"step-{i}.png") for i, frame in enumerate(frames)]
        return (
            gr.Slider(maximum=len(frames) - 1, value=middle, interactive=True),
            paths[middle],
            write_file(animation(frames), "interpolation.webp"),
            _strip(frames, "strip.png"),
            _strip(levels, "levels.png"),
            paths,
            "",  # in place of EMPTY
        )

    def levels(
        self,
        model: str,
        first: str,
        level: int,
        seed: float | None,
        resize: bool,
        explored: Runs,
    ) -> Any:
        """The first image from its coarsest levels alone, and with one level of other samples."""
        client, bundle = self.models.clients[model], self.models.bundles[model]
        if level >= len(bundle.latent_shapes):
            raise gr.Error(
                f"This model has no level {level}: it has {len(bundle.latent_shapes)} levels, and "
                "0 is the coarsest."
            )
        chosen = explored.chosen
        if chosen is not None and chosen[:2] != (model, first):  # while this run waited
            return gr.skip(), gr.skip()
        own = noise_of(read(first), client, bundle, resize)
        coarse = ask(client.sample_with, from_coarsest(own))
        # Index 0 would give the first image itself, if it was drawn with this seed.
        streams = [NoiseStream(sample_key(read_seed(seed), 1 + i)) for i in range(VARIATIONS)]
        others = [
            np.stack([stream.normal(shape) for stream in streams]) for shape in bundle.latent_shapes
        ]
        varied = ask(client.sample_with, with_level(own, others, int(level)))
        if explored.chosen != chosen:  # the page shows other images meanwhile
            return gr.skip(), gr.skip()
        return _strip(coarse, "coarse.png"), _strip(varied, "varied.png")

    def _lay_out_ends(self, context: TabContext) -> None:
        with gr.Column(scale=2, min_width=280):
            with gr.Row():
                for image in self.ends:
                    image.height = 190
                    image.min_width = 130
                    image.render()
            self.go = gr.Button("Explore", variant="primary")
            self.seeds = []
            # Closed, so that the result is near the top of a phone.
            with gr.Accordion("Choose other images", open=False), gr.Row():
                for side, value, image in zip(("From", "To"), (1, 2), self.ends, strict=True):
                    with gr.Column(min_width=130):
                        known_examples(context, image, f"{side}, for example", min_width=120)
                        seed = seed_input(value, f"Seed ({side.lower()})", min_width=80)
                        button = gr.Button("Draw this seed", size="sm")
                    button.click(self.draw, [context.model, seed], image, **PRIVATE)
                    self.seeds.append(seed)
            with gr.Accordion("More settings", open=False):
                self.steps = slider(3, 16, value=STEPS, step=1, label="Steps")
                self.resize = resize_input()

    def _lay_out_steps(self) -> None:
        with gr.Column(scale=3, min_width=280, elem_classes="ade-outcome"):
            with gr.Row():
                with gr.Column(min_width=200):
                    self.frame = image_output("Interpolated image", height=220)
                    self.place = gr.Slider(
                        0, STEPS - 1, value=STEPS // 2, step=1, label="Position", interactive=False
                    )
                with gr.Column(min_width=200):
                    self.animated = image_output("Animation, forwards and backwards", height=220)
            self.strip = image_strip("Interpolation, step by step")
            caption(
                "From one image to the other through the model's latents. The first and the last "
                "picture are reconstructions of the two images."
            )
            self.said = live(empty(EMPTY))

    def _lay_out_levels(self) -> None:
        choices = list(range(self.models.most_levels))
        with gr.Row():
            self.level = gr.Radio(choices, value=0, label="Level to change, 0 is the coarsest")
            self.variation = seed_input(1, "Seed of the other samples", min_width=80)
            self.look = gr.Button("Show its levels", interactive=False)
        self.coarse = image_strip("From its coarsest level alone, from two, … all levels")
        self.varied = image_strip("The chosen level from other samples, all other levels its own")

    def _listen(self, context: TabContext) -> None:
        model, ends, strip = context.model, self.ends, self.strip
        walk = gr.State(time_to_live=KEPT_S)
        results: dict[Any, Any] = {
            self.place: gr.update(interactive=False),
            self.frame: None,
            self.animated: None,
            strip: None,
            self.exchange: None,
            walk: None,
            self.said: empty(EMPTY),
        }
        runs = run_on_new_image(
            context,
            ends,
            self.explore,
            [model, *ends, self.steps, self.resize],
            results,
            self.said,
            self.go,
            "explore",
            others=[self.coarse, self.varied],
            progress=[self.said, strip],
        )
        # Before, there may be no first image, or the exploration to come would empty its levels.
        js = "(strip) => ({ __type__: 'update', interactive: strip !== null })"
        strip.change(None, strip, self.look, js=js, **PRIVATE)
        self.look.click(
            latest_only(self.levels, 2),
            [model, ends[0], self.level, self.variation, self.resize, runs, gr.State(Runs())],
            [self.coarse, self.varied],
            api_name="levels",
            show_progress_on=self.coarse,
            trigger_mode="multiple",
        )
        # Only the browser fills empty inputs: an image may have arrived while samples were drawn.
        drawn = [image_output("", visible=False) for _ in ends]
        opened = context.tab.select(self.first_ends, [model, *ends, *self.seeds], drawn, **QUIET)
        js = "(first, last, a, b) => [first ?? a, last ?? b]"
        opened.success(None, [*ends, *drawn], ends, js=js, **PRIVATE)
        # Without Gradio's checks, which report an error for each value of a number that is typed.
        self.place.change(frame_at, [self.place, walk], self.frame, preprocess=False, **QUIET)
