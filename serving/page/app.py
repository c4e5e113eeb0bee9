"""The page's layout, and its server with ``/readyz`` and ``/openapi.json``."""

from __future__ import annotations

import argparse
import math
import os
import threading
import time
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from serving.bundle import Bundle, open_bundle
from serving.openapi import openapi_document
from serving.page import about, compare, explore, many, reconstruct, reproduce, sample, score
from serving.page.served import Served, Shared, make_inbox
from serving.page.sweep import start_sweeping
from serving.ports import USER

QUEUE_SLEEP_S = 0.02  # Gradio looks for work a thousand times a second, which takes 6 % of a core from the model
READY_FOR_S = 1.0  # an answer that all is well holds so long
TABS = {"Sample": sample, "Explore": explore, "Reconstruct": reconstruct, "Score": score, "Score many": many,
        "Compare": compare, "Reproduce": reproduce, "About": about}
CSS = """
.ade-pixels img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain; }
.ade-grid .grid-wrap { height: auto !important; max-height: none !important; min-height: 0; overflow: visible; }
.ade-label { font: 13px system-ui, sans-serif; fill: var(--body-text-color); }
.ade-bar { fill: var(--primary-400); } .ade-total { fill: var(--secondary-500); }
.ade-mark { stroke: #d9480f; stroke-width: 2; }
.ade-why { width: 100%; border-collapse: collapse; font-size: 0.85rem; }
.ade-why caption { text-align: left; font-weight: 600; }
.ade-why td, .ade-why th { border: 0; border-bottom: 1px solid var(--border-color-primary); padding: 4px 6px; }
.ade-caption { font-size: 0.85rem; opacity: 0.75; max-width: 560px; }
.ade-verdict p { font-size: 1.25rem; font-weight: 600; }
"""


# Fonts of the reader's own machine: nothing is fetched from elsewhere.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build_page(served: Served) -> gr.Blocks:
    """All tabs under one head."""
    names = {name: "{}, {} × {} pixels".format(name, *bundle.image_shape[1::-1]) for name, bundle in served.bundles.items()}
    with gr.Blocks(title="AV-ADE", analytics_enabled=False) as page:
        gr.Markdown("# AV-ADE\nA generative image model with likelihoods: sample it, see what it keeps of an image, "
                    f"ask how likely an image is. {names[served.first]}.")
        choices = [(name, value) for value, name in names.items()]
        model = gr.Dropdown(choices, value=served.first, label="Model", visible=len(served.bundles) > 1)
        with gr.Tabs() as tabs:
            shared = Shared(served, model, tabs, make_inbox())
            for name, tab in TABS.items():
                if tab is compare and len(served.bundles) == 1:
                    continue  # there is nothing to compare with
                with gr.Tab(name, id=name):
                    tab.add_tab(shared)
    return page


def make_app(url: str, bundles: list[Bundle], token: str | None) -> FastAPI:
    """The page, ``/readyz`` and ``/openapi.json`` in one application."""
    served = Served(url, bundles, token)
    app = FastAPI(title="AV-ADE page", docs_url=None, redoc_url=None, openapi_url=None)

    asking, ready, known_at = threading.Lock(), False, -math.inf

    @app.get("/readyz")
    def readyz() -> JSONResponse:
        nonlocal ready, known_at
        with asking:  # anybody may ask, and to know it takes four inferences; who waited takes what the first was told
            if time.monotonic() - known_at >= READY_FOR_S:
                ready = served.is_ready()
                known_at = time.monotonic()
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    document = openapi_document(url, bundles, token is not None)

    @app.get("/openapi.json")
    def openapi() -> JSONResponse:
        return JSONResponse(document)

    blocks = build_page(served).queue(default_concurrency_limit=4)
    blocks._queue.sleep_when_free = QUEUE_SLEEP_S
    mounted: FastAPI = gr.mount_gradio_app(app, blocks, path="/", css=CSS, theme=THEME,
                                           auth=None if token is None else (USER, token), show_error=True,
                                           max_file_size="16mb",
                                           footer_links=["api"])
    return mounted


def main() -> None:
    """``python -m serving.page.app``; the launcher calls it."""
    parser = argparse.ArgumentParser(description="The web page of a running service.")
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--url", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    app = make_app(args.url, [open_bundle(folder) for folder in args.bundles], os.environ.get("ADE_TOKEN"))
    if "GRADIO_TEMP_DIR" in os.environ:  # the launcher gives the page a folder of its own
        start_sweeping(Path(os.environ["GRADIO_TEMP_DIR"]))
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
