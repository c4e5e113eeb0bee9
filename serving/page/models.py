"""The models that the page shows: their clients, calibrations and example images, and errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import httpx

from ade_base.pictures.read import RESIZING
from ade_client.client import AdeClient, AdeError
from ade_client.contract import DEFAULT
from serving.engine.bundle import Bundle
from serving.engine.calibrations import open_calibrations
from serving.ingest.errors import ApiError
from serving.page.drawings import DRAWINGS, draw
from serving.page.files import write_file
from serving.verdict.calibration_file import CalibrationPair

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.png"))
EXAMPLES_OF = "cifar10"  # the data set of these photographs
PHOTOGRAPHS = "CIFAR-10 photographs"
OWN = "Images that calibrated the gate"
RESIZE = "Resize other sizes to fit"
PROBE_TIMEOUT_S = 20.0  # for all answers to /readyz together
NOT_AN_IMAGE = (
    "This file is not an image that the page can read. Use PNG, JPEG, WebP, AVIF, BMP, GIF or TIFF."
)
OTHER_MODEL = "The service now has another model. Reload the page."


class Models:
    """The models of one service.

    Args:
        url: of the inference address.
        bundles: the served bundles, the first under the plain names; only their manifests,
            calibrations and example images are read.
        token: the service's token, if it requires one.
    """

    def __init__(self, url: str, bundles: list[Bundle], token: str | None) -> None:
        self.url = url
        self.needs_token = token is not None
        self.bundles = {bundle.name: bundle for bundle in bundles}
        self.clients = {
            bundle.name: AdeClient(
                url,
                model=bundle.name if i else None,
                token=token,
                identity=bundle.model_id,  # another release cannot decode its latents
            )
            for i, bundle in enumerate(bundles)
        }
        self._calibrations = {bundle.name: open_calibrations(bundle)[DEFAULT] for bundle in bundles}

    def calibrations_of(self, model: str) -> CalibrationPair:
        """The calibrations by which the service judges a model's images."""
        return self._calibrations[model]

    def calibration_data(self, model: str) -> str:
        """The name of the images that a model's gate was calibrated on; empty if it is unknown."""
        about = self.bundles[model].manifest.get("calibration") or {}
        return str(about.get("data", ""))

    @property
    def first(self) -> str:
        return next(iter(self.bundles))

    @property
    def most_levels(self) -> int:
        """The largest number of latent levels of any model."""
        return max(len(bundle.latent_shapes) for bundle in self.bundles.values())

    def is_ready(self) -> bool:
        """Whether all four operations of every model answer."""
        deadline = time.monotonic() + PROBE_TIMEOUT_S
        return all(c.is_ready(deadline - time.monotonic()) for c in self.clients.values())


class Examples:
    """Example images, in files of the page: some that a gate knows, and drawings.

    The names of the kinds predict no verdict: the calibration may be replaced while the page runs.
    """

    def __init__(self, models: Models) -> None:
        few = EXAMPLES[: len(DRAWINGS)]
        photographs = (PHOTOGRAPHS, [(one.name, one.read_bytes()) for one in few])
        kept = {
            name: (OWN, [(one, bundle.file(one).read_bytes()) for one in bundle.examples])
            for name, bundle in models.bundles.items()
        }
        self.known: dict[str, tuple[str, list[str]]] = {}  # label and files, by model
        for name, (label, images) in kept.items():
            if not images and models.calibration_data(name) == EXAMPLES_OF:
                label, images = photographs
            self.known[name] = (label, _written(images))
        self.drawings = _written([(f"{name}.png", draw(name)) for name in DRAWINGS])


def _written(images: list[tuple[str, bytes]]) -> list[str]:
    return [write_file(data, name) for name, data in images]


def ask(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call the client; raises :func:`page_error` of its errors."""
    try:
        return call(*args, **options)
    except (AdeError, httpx.TransportError) as error:
        raise page_error(error) from None


def page_error(error: AdeError | httpx.TransportError) -> gr.Error:
    """An error of the client as the page shows it."""
    if isinstance(error, AdeError):
        return gr.Error(sentence(error))
    return gr.Error("The service does not answer. It may be starting or stopping: try again.")


def sentence(error: AdeError | ApiError) -> str:
    """An error of the API in the page's words."""
    if error.message.startswith("not an image:"):
        return NOT_AN_IMAGE
    if error.code == "other_model":
        return OTHER_MODEL
    message = error.message.replace(f"{RESIZING} resizes them", f'tick "{RESIZE}" to resize them')
    return message[:1].upper() + message[1:] + "."


def usable(result: Any) -> Any:
    """Return the result of one image, or raise its error on the page."""
    if isinstance(result, AdeError):
        raise page_error(result)
    return result
