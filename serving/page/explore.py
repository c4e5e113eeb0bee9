"""The tab *Explore*: from one image to another through the latents, and which level holds what."""

from __future__ import annotations

import io
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image

from serving.images import tile, write_png
from serving.page.served import Served, ask, file, image_input, image_output, read

FRAME_MS = 120
FRAME_SCALE = 4


def between(a: list[np.ndarray], b: list[np.ndarray], steps: int) -> list[np.ndarray]:
    """Latents on the way from ``a`` to ``b``, each a list of ``(1, c, h, w)``: one array ``(steps, c, h, w)`` a level.

    On the great circle, so that they stay as long as the ends are: the middle of a straight line is shorter than any
    draw of the prior.
    """
    t = np.linspace(0, 1, steps, dtype=np.float64)[:, None, None, None]
    levels = []
    for first, last in zip(a, b, strict=True):
        lengths = np.linalg.norm(first), np.linalg.norm(last)
        cosine = float((first * last).sum() / (lengths[0] * lengths[1] + 1e-12))
        angle = np.arccos(np.clip(cosine, -1, 1))
        if angle < 1e-3:
            levels.append(((1 - t) * first + t * last).astype(np.float32))
        else:
            levels.append(((np.sin((1 - t) * angle) * first + np.sin(t * angle) * last) / np.sin(angle)).astype(np.float32))
    return levels


def exchanged(a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
    """Coarse levels of ``a`` with fine ones of ``b``: none, one, … all of ``a``; each level ``(levels + 1, c, h, w)``."""
    count = len(a)
    return [np.concatenate([first if level < kept else last for kept in range(count + 1)])
            for level, (first, last) in enumerate(zip(a, b, strict=True))]


def animation(frames: np.ndarray) -> bytes:
    """There and back, lossless WebP, enlarged without smoothing; uint8 ``(N, H, W, C)``."""
    shown = [Image.fromarray(f[:, :, 0] if f.shape[2] == 1 else f).convert("RGB") for f in [*frames, *frames[-2:0:-1]]]
    shown = [f.resize((f.width * FRAME_SCALE, f.height * FRAME_SCALE), Image.Resampling.NEAREST) for f in shown]
    out = io.BytesIO()
    shown[0].save(out, "WEBP", save_all=True, append_images=shown[1:], duration=FRAME_MS, loop=0, lossless=True)
    return out.getvalue()


def add_tab(served: Served, model: gr.Dropdown) -> None:
    """Lay the tab out."""
    def draw(model: str, seed: float) -> str:
        """One sample, to start or to end with."""
        data, used = ask(served.clients[model].sample_png, n=1, seed=int(seed or 0))
        return file(data, f"seed-{used}.png")

    def explore(model: str, first: str, last: str, steps: float, resize: bool) -> tuple[str, str, str]:
        """The way as a strip and as an animation, and the levels exchanged."""
        for image in (first, last):
            read(image)
        client = served.clients[model]
        # Draws, not means: a mean lies nearer to the origin than any latents that the decoder was trained on.
        latents = ask(client.encode, [Path(first).read_bytes(), Path(last).read_bytes()], resize=resize).z
        a, b = [z[:1] for z in latents], [z[1:] for z in latents]
        frames = ask(client.decode, between(a, b, int(steps)))
        levels = ask(client.decode, exchanged(a, b))
        return (file(write_png(tile(frames, len(frames))), "strip.png"), file(animation(frames), "interpolation.webp"),
                file(write_png(tile(levels, len(levels))), "levels.png"))

    with gr.Row():
        for side, seed_value in (("From", 1), ("To", 2)):
            with gr.Column():
                image = image_input(side)
                with gr.Row():
                    seed = gr.Number(value=seed_value, precision=0, minimum=0, label="Seed", scale=2)
                    button = gr.Button(f"{side} a sample of this seed", scale=3)
                button.click(draw, [model, seed], image, api_visibility="private")
                if side == "From":
                    first = image
                else:
                    last = image
    with gr.Row():
        steps = gr.Slider(3, 16, value=9, step=1, label="Steps")
        resize = gr.Checkbox(False, label="Resize other sizes to fit")
        go = gr.Button("Explore", variant="primary")
    strip = image_output("The way from one to the other", height=160)
    with gr.Row():
        animated = gr.File(label="The same, animated (lossless WebP)")
        levels = image_output("Fine levels of the second, with none, one, … all coarse ones of the first", height=200)
    go.click(explore, [model, first, last, steps, resize], [strip, animated, levels], api_name="explore")
