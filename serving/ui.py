"""The web page: it holds no weights and asks the HTTP API, as any client would."""

from __future__ import annotations

import argparse
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from serving.bundle import CALIBRATION_NAME, Bundle, open_bundle
from serving.charts import explain_table, histogram_chart, parts_chart
from serving.client import AdeClient, AdeError, ScoreResult
from serving.images import ImageError, read_image, write_png
from serving.ood import Calibration
from serving.openapi import openapi_document
from serving.ports import USER

EXAMPLES = sorted((Path(__file__).parent / "examples").glob("*.png"))
MAX_GRID = 64
QUEUE_SLEEP_S = 0.02  # Gradio looks for work a thousand times a second, which takes 6 % of a core from the model
REASONS = 6  # statistics that the page shows of an image
KINDS = [("mean: f⁻¹(μ(z)), what the discriminator saw", "mean"),
         ("density: f⁻¹(μ(z) + σε), what the likelihood describes", "density")]
CSS = """
.ade-pixels img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain; }
.ade-label { font: 13px system-ui, sans-serif; fill: var(--body-text-color); }
.ade-bar { fill: var(--primary-400); } .ade-total { fill: var(--secondary-500); }
.ade-mark { stroke: #d9480f; stroke-width: 2; }
.ade-why { width: 100%; border-collapse: collapse; font-size: 0.85rem; }
.ade-why caption { text-align: left; font-weight: 600; }
.ade-why td, .ade-why th { border: 0; border-bottom: 1px solid var(--border-color-primary); padding: 4px 6px; }
.ade-verdict p { font-size: 1.25rem; font-weight: 600; }
"""


# Fonts of the reader's own machine: nothing is fetched from elsewhere.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


class Page:
    """The page of one service, with one or several models.

    Args:
        url: of the inference address.
        bundles: that are served, the first under the plain names; only their manifests and calibrations are read.
        token: where the service asks for one.
    """

    def __init__(self, url: str, bundles: list[Bundle], token: str | None) -> None:
        self._bundles = {bundle.name: bundle for bundle in bundles}
        self._clients = {bundle.name: AdeClient(url, model=bundle.name if i else None, token=token)
                         for i, bundle in enumerate(bundles)}
        self._calibrations = {bundle.name: Calibration.load(bundle.file(CALIBRATION_NAME))
                              for bundle in bundles if bundle.has(CALIBRATION_NAME)}

    def is_ready(self) -> bool:
        """Whether all four operations of every model answer."""
        return all(client.is_ready() for client in self._clients.values())

    def build(self) -> gr.Blocks:
        """The page's layout."""
        first = next(iter(self._bundles))
        with gr.Blocks(title="AV-ADE", analytics_enabled=False) as page:
            gr.Markdown("# AV-ADE\nA generative image model with likelihoods: sample it, see what it keeps of an image, "
                        "ask how likely an image is.")
            model = gr.Dropdown(list(self._bundles), value=first, label="Model", visible=len(self._bundles) > 1)
            with gr.Tab("Sample"):
                self._sample_tab(model)
            with gr.Tab("Reconstruct"):
                self._reconstruct_tab(model)
            with gr.Tab("Score"):
                self._score_tab(model)
            gr.Markdown(self._about(first))
        return page

    def _sample_tab(self, model: gr.Dropdown) -> None:
        with gr.Row():
            with gr.Column(scale=1):
                n = gr.Slider(1, MAX_GRID, value=16, step=1, label="Images")
                with gr.Row():
                    seed = gr.Number(value=7, precision=0, minimum=0, label="Seed", scale=3)
                    dice = gr.Button("⚄ New seed", scale=1, min_width=90)
                temperature = gr.Slider(0.1, 1.5, value=1.0, step=0.05, label="Temperature",
                                        info="multiplies the prior's standard deviations")
                kind = gr.Radio(KINDS, value="mean", label="Kind")
                go = gr.Button("Sample", variant="primary")
            with gr.Column(scale=2):
                grid = gr.Image(label="Samples", type="filepath", format="png", interactive=False,
                                height="min(512px, 92vw)", elem_classes="ade-pixels", buttons=["fullscreen"])
                download = gr.DownloadButton("Download PNG (its text holds the seed)", interactive=False)
        inputs = [model, n, seed, temperature, kind]
        go.click(self.sample, inputs, [grid, download], api_name="sample")
        dice.click(lambda: secrets.randbelow(2**31), None, seed, api_visibility="private").then(
            self.sample, inputs, [grid, download], api_visibility="private")

    def _reconstruct_tab(self, model: gr.Dropdown) -> None:
        with gr.Row():
            with gr.Column(scale=1):
                image = _image_input()
                kind = gr.Radio(KINDS, value="mean", label="Kind")
                resize = gr.Checkbox(False, label="Resize other sizes to fit")
                go = gr.Button("Reconstruct", variant="primary")
            with gr.Column(scale=2):
                with gr.Row():
                    shown = [_image_output(name) for name in ("Input", "Reconstruction", "Difference × 2")]
                said = gr.Markdown()
        _examples(image)
        go.click(self.reconstruct, [model, image, kind, resize], [*shown, said], api_name="reconstruct")

    def _score_tab(self, model: gr.Dropdown) -> None:
        with gr.Row():
            with gr.Column(scale=1):
                image = _image_input()
                samples = gr.Slider(1, 64, value=1, step=1, label="Draws (K)",
                                    info="1 is the ELBO; more tighten the bound")
                alpha = gr.Slider(0.001, 0.2, value=0.01, step=0.001, label="False-alarm rate (alpha)")
                resize = gr.Checkbox(False, label="Resize other sizes to fit")
                go = gr.Button("Score", variant="primary")
            with gr.Column(scale=2):
                verdict = gr.Markdown(elem_classes="ade-verdict")
                parts = gr.HTML(label="Parts, bits per dimension")
                place = gr.HTML(label="Place among the calibration images")
                with gr.Row():
                    with gr.Column(min_width=280):
                        heat = _image_output("Where the bits lie: bright is dear")
                    with gr.Column(min_width=280):
                        why = gr.HTML(label="The most unusual statistics")
        _examples(image)
        go.click(self.score, [model, image, samples, alpha, resize], [verdict, parts, place, heat, why],
                 api_name="score")

    def sample(self, model: str, n: float, seed: float, temperature: float, kind: str) -> tuple[str, Any]:
        """A grid of samples as a PNG file."""
        if seed is None:
            raise gr.Error("The seed is empty: it must be a whole number from 0 on.")
        data, used = self._ask(self._clients[model].sample_png, n=int(n), seed=int(seed), temperature=float(temperature),
                               kind=kind)
        path = _file(data, f"samples-{used}-{int(n)}.png")
        return path, gr.DownloadButton(value=path, interactive=True)

    def reconstruct(self, model: str, image: str, kind: str, resize: bool) -> tuple[str, str, str, str]:
        """The image as the model sees it, its reconstruction and their difference, as PNG files."""
        original = _read(image)
        (result,) = self._ask(self._clients[model].reconstruct, [Path(image).read_bytes()], kind=kind, resize=resize)
        if isinstance(result, AdeError):
            raise gr.Error(_sentence(result))
        made = result.image.astype(int)
        said = f"**PSNR {result.psnr:.2f} dB**" + "".join(f"\n- {note}" for note in result.notes)
        if original.shape != result.image.shape:
            return _file(write_png(original), "input.png"), _file(write_png(result.image), "reconstruction.png"), "", said
        difference = np.clip(128 + 2 * (made - original), 0, 255).astype(np.uint8)
        return (_file(write_png(original), "input.png"), _file(write_png(result.image), "reconstruction.png"),
                _file(write_png(difference), "difference.png"), said)

    def score(self, model: str, image: str, samples: float, alpha: float, resize: bool) -> tuple[
            str, str, str, str | None, str]:
        """The verdict in words, the parts, the place in the reference histogram, the heat map and the reasons."""
        _read(image)
        (result,) = self._ask(self._clients[model].score, [Path(image).read_bytes()], samples=int(samples), alpha=alpha,
                              resize=resize, map=True)
        if isinstance(result, AdeError):
            raise gr.Error(_sentence(result))
        calibration = self._calibrations.get(model)
        place = histogram_chart(calibration.bpd, result.bpd) if calibration else ""
        heat = result.heat_map and _file(result.heat_map, "map.png")
        why = explain_table(result.explain[:REASONS]) if result.explain else ""
        return _verdict(result, alpha), parts_chart(result.bpd_parts, result.bpd), place, heat or None, why

    def _about(self, name: str) -> str:
        manifest = self._bundles[name].manifest
        height, width, _ = self._bundles[name].image_shape
        training = manifest.get("training", {})
        lines = [f"**{name}** — recipe `{manifest['recipe']}`, {width} × {height} pixels, trained on "
                 f"{manifest['data'].get('name')} ({training.get('images_seen', 0):,} images seen, "
                 f"{training.get('weights', 0):,} weights)."]
        evaluation = manifest.get("evaluation")
        if evaluation and "elbo" in evaluation:
            lines.append(f"Held-out images ({evaluation['part']}): {evaluation['elbo']['bpd']:.3f} bits per dimension "
                         f"(ELBO, {evaluation['images']:,} images).")
        lines.append("A verdict tells unusual pictures; another kind of thing in a picture of the usual kind may pass.")
        lines.append("The HTTP API: [OpenAPI document](/openapi.json).")
        return " ".join(lines)

    @staticmethod
    def _ask(call: Any, *args: Any, **options: Any) -> Any:
        """A call of the client; what the API answers as an error is shown as a sentence."""
        try:
            return call(*args, **options)
        except AdeError as error:
            raise gr.Error(_sentence(error)) from None
        except httpx.TransportError:
            raise gr.Error("The service does not answer. It may be starting or stopping: try again.") from None


def _sentence(error: AdeError) -> str:
    return error.message[:1].upper() + error.message[1:] + "."


def _verdict(result: ScoreResult, alpha: float) -> str:
    error = f" ± {result.standard_error:.3f}" if result.standard_error is not None else ""
    head = f"{result.bpd:.3f}{error} bits per dimension. "
    if result.p_value is None:
        verdict = "No verdict."
    elif result.ood:
        verdict = f"Unlike the training images (p = {result.p_value:.4f} ≤ {alpha:g})."
    else:
        verdict = f"Not unusual (p = {result.p_value:.3f})."
    return head + verdict + "".join(f"\n- {note}" for note in result.notes)


def _read(path: str | None) -> np.ndarray:
    if path is None:
        raise gr.Error("There is no image yet: drop one, or choose an example.")
    try:
        return read_image(Path(path).read_bytes()).pixels
    except ImageError as error:
        raise gr.Error(str(error)) from None


def _file(data: bytes, name: str) -> str:
    """A file for the page to show; Gradio serves it as it is, text keys included."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")))
    (folder / name).write_bytes(data)
    return str(folder / name)


def _image_input() -> gr.Image:
    return gr.Image(label="Image", type="filepath", format="png", sources=["upload", "clipboard"], height=256,
                    elem_classes="ade-pixels")


def _image_output(label: str) -> gr.Image:
    return gr.Image(label=label, type="filepath", format="png", interactive=False, height=256, elem_classes="ade-pixels",
                    buttons=["download", "fullscreen"])


def _examples(image: gr.Image) -> None:
    if EXAMPLES:
        gr.Examples([[str(path)] for path in EXAMPLES], [image], examples_per_page=12, label="Examples")


def make_app(url: str, bundles: list[Bundle], token: str | None) -> FastAPI:
    """The page, ``/readyz`` and ``/openapi.json`` in one application."""
    page = Page(url, bundles, token)
    app = FastAPI(title="AV-ADE page", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/readyz")
    def readyz() -> JSONResponse:
        ready = page.is_ready()
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    document = openapi_document(url, bundles, token is not None)

    @app.get("/openapi.json")
    def openapi() -> JSONResponse:
        return JSONResponse(document)

    blocks = page.build().queue(default_concurrency_limit=4)
    blocks._queue.sleep_when_free = QUEUE_SLEEP_S
    mounted: FastAPI = gr.mount_gradio_app(app, blocks, path="/", css=CSS, theme=THEME,
                                           auth=None if token is None else (USER, token), show_error=True,
                                           max_file_size="16mb",
                                           footer_links=["api"])
    return mounted


def main() -> None:
    """``python -m serving.ui``; the launcher calls it."""
    parser = argparse.ArgumentParser(description="The web page of a running service.")
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--url", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    app = make_app(args.url, [open_bundle(folder) for folder in args.bundles], os.environ.get("ADE_TOKEN"))
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
