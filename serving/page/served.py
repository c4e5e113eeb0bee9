"""What the page's tabs share: models, clients, inputs, errors, and the runs of a session."""

from __future__ import annotations

import functools
import inspect
import io
import math
import re
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import numpy as np
from gradio.components import Component
from gradio.context import LocalContext
from PIL import Image

from ade_base.pictures.read import RESIZING, file_size
from ade_client.client import AdeClient, AdeError
from serving.engine.bundle import Bundle
from serving.engine.calibrations import open_calibrations
from serving.ingest.errors import ApiError
from serving.ingest.requests import InputImage, prepare_image
from serving.page.charts import problem
from serving.page.drawings import DRAWINGS, draw
from serving.page.files import KEPT_S, FileRefused, read_file, write_file
from serving.page.uploads import CLIENT_BYTES, CLIENT_FILES
from serving.verdict.calibration_file import Calibrations
from serving.verdict.store import FOLDER

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.png"))
KINDS = [("clean", "mean"), ("with noise", "density")]
KINDS_INFO = "Clean: smooth, best to look at. With noise: with the pixel noise of the model."
RESIZE = "Resize other sizes to fit"
RESIZE_INFO = "Images of other proportions are cropped to their centre."
PROBE_TIMEOUT_S = 20.0  # for all answers to /readyz together
NO_IMAGE = "There is no image yet: drop one, or choose an example."
NOT_AN_IMAGE = (
    "This file is not an image that the page can read. Use PNG, JPEG, WebP, BMP, GIF or TIFF."
)
OTHER_MODEL = "The service now has another model. Reload the page."
NOT_STARTED = "The page could not start this. Try again; if that does not help, reload the page."
UNEXPECTED = (
    "Something went wrong on the page. Reload it and try again. If it happens again, tell the "
    "person who runs this service."
)


class Served:
    """The models of one service.

    Args:
        url: of the inference address.
        bundles: the served bundles, the first under the plain names; only their manifests and
            calibrations are read.
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
                identity=bundle.model_id,  # a canary beside it cannot decode its latents
            )
            for i, bundle in enumerate(bundles)
        }
        self._stores = {
            bundle.name: open_calibrations(bundle, bundle.folder / FOLDER) for bundle in bundles
        }

    def calibrations_of(self, model: str) -> Calibrations:
        """The calibrations by which the service judges a model's images, or did a second ago."""
        return self._stores[model].get()

    def calibration_data(self, model: str) -> str:
        """The name of the images that a model's gate was calibrated on; empty if it is unknown."""
        about = self.bundles[model].manifest.get("calibration") or {}
        return self.calibrations_of(model).data or str(about.get("data", ""))

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
class Shared:
    """What every tab needs to lay itself out."""

    served: Served
    model: gr.Dropdown  # its value is a name of ``served.bundles``
    tabs: gr.Tabs
    tab: gr.Tab  # the one that is laid out
    shown: gr.Radio  # its value is the name of the tab that the browser shows
    inbox: Inbox
    examples: dict[str, list[str]]  # files by their description


def make_inbox() -> Inbox:
    """Make the inputs; none of them is on the page yet."""
    return Inbox(*(image_input(label) for label in ("From", "To", "Image", "Image", "Image")))


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


def as_seen(data: bytes, bundle: Bundle, resize: bool) -> InputImage:
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


MODEL_ID = re.compile(r"[\w.-]{1,100}@[0-9a-f]{12}")


def png_text(picture: Image.Image) -> dict[str, str]:
    """The text of a PNG that says how it was made here."""
    return {
        str(key): str(value) for key, value in picture.info.items() if str(key).startswith("ade:")
    }


def made_here(data: bytes, shape: tuple[int, int, int]) -> tuple[np.ndarray, dict[str, str]] | None:
    """Read the pixels, uint8 ``(H, W, C)``, and text of one sample; ``None`` for another shape."""
    found = open_png(data) if file_size(data) == (shape[1], shape[0]) else None
    if found is None or found[0].size != math.prod(shape):
        return None
    return found[0].reshape(shape), found[1]


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


def image_strip(label: str) -> gr.Image:
    """An output for several images in a row, as wide as the page allows."""
    return image_output(label, height=None, elem_classes="ade-pixels ade-strip")


def image_pair(left: str, right: str) -> gr.ImageSlider:
    """Two images of one size, one over the other, with a slider between them.

    ``serving.page.theme`` takes their alternative texts from the label.
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


def html(value: str = "", **options: Any) -> gr.HTML:
    """An element of HTML in the page's own style."""
    return gr.HTML(value, apply_default_css=False, js_on_load=None, **options)


def live(value: str = "") -> gr.HTML:
    """An element of HTML whose changes screen readers read out, see ``serving.page.theme``."""
    return html(value, elem_classes="ade-live")


def example_files() -> dict[str, list[str]]:
    """Example images by kind, photographs and as many drawings, in files of the page.

    The names of the kinds predict no verdict: the calibration may be replaced while the page runs.
    """
    return {
        "CIFAR-10 photographs": [
            write_file(path.read_bytes(), path.name) for path in EXAMPLES[: len(DRAWINGS)]
        ],
        "Drawings, text, noise": [write_file(draw(name), f"{name}.png") for name in DRAWINGS],
    }


def examples(image: gr.Image, files: dict[str, list[str]], min_width: int = 280) -> None:
    """Lay out example images, one row per kind; a click on one fills ``image``."""
    with gr.Row(elem_classes="ade-examples"):
        for label, paths in files.items():
            with gr.Column(min_width=min_width):
                chosen = gr.Dataset(
                    components=[gr.Image(type="filepath", format="png", render=False)],
                    samples=[[path] for path in paths],
                    type="index",
                    samples_per_page=len(paths),
                    label=label,
                )
                # Not gr.Examples, which replaces the image input by one without our preprocess.
                chosen.click(
                    lambda i, paths=paths: paths[i],
                    chosen,
                    image,
                    show_progress="hidden",
                    # By default Gradio drops a click while an earlier one is unanswered.
                    trigger_mode="always_last",
                    queue=False,
                    api_visibility="private",
                ).failure(  # through the queue: Gradio shows no errors of other events
                    lambda: None, show_progress="hidden", api_visibility="private"
                )


class Runs:
    """The runs of a tab in one session: only the latest shows its results.

    Gradio's ``cancels`` are no alternative: they wait for the server, then run the failure
    listeners of the cancelled run, and lose the results of a run that started meanwhile.
    """

    def __init__(self) -> None:
        self.latest = 0
        self.failed = 0
        self.error = ""  # the message of the run that failed
        # What was last chosen on the page that the results depend on, once it has changed.
        self.chosen: tuple[Any, ...] | None = None
        self.is_due = False  # whether the run that this choice causes has yet to start
        self.under_way = 0  # the last run that started and has not ended, if any

    def start(self) -> int:
        """Number a run; from now on, the results of earlier ones are out of date."""
        self.latest += 1
        return self.latest


_is_outdated: ContextVar[Callable[[], bool]] = ContextVar("is_outdated", default=lambda: False)


def is_outdated() -> bool:
    """Whether nobody will see the results of the present run: a long one may end.

    A later run has begun, for one under :func:`latest_only`, or the tab that asked was closed.
    """
    return _is_outdated.get()() or _is_abandoned()


def _is_abandoned() -> bool:
    """Whether Gradio has noticed that the tab that asked for the present run was closed."""
    blocks, event_id = LocalContext.blocks.get(None), LocalContext.event_id.get(None)
    if blocks is None or event_id is None:  # not called by Gradio, or not through its queue
        return False
    event = blocks._queue.event_ids_to_events.get(event_id)
    return event is not None and not event.alive


def _is_api_call() -> bool:
    """Whether a client of Gradio's API asked for the present run, not the page in a browser."""
    request = LocalContext.request.get(None)
    return request is not None and request.headers.get("x-gradio-user") == "api"


def latest_only(
    run: Callable[..., Any], outputs: int, of: Sequence[int] = (), changed: str = ""
) -> Callable[..., Any]:
    """Drop the results or the error of a run if a later run has started meanwhile.

    The decorated function takes a :class:`Runs` as one more argument. Calls of the API are
    independent: a client may make several at once in one session, and waits for each result.

    Args:
        run: the function.
        outputs: number of its results.
        of: which of its arguments are what was chosen. A run of another choice than the present one
            does not start: it waited meanwhile, or came before the change was known here.
        changed: the error of such a run; none if the present choice starts a run by itself.
    """

    @functools.wraps(run)
    def numbered(*values: Any) -> Any:
        *given, runs = values
        if _is_api_call():
            return run(*given)
        if of and runs.chosen not in (None, tuple(given[i] for i in of)):
            if changed:
                raise gr.Error(changed)
            return (gr.skip(),) * outputs if outputs > 1 else gr.skip()
        number = runs.under_way = runs.start()
        _is_outdated.set(lambda: number != runs.latest)
        try:
            found = run(*given)
        except Exception as error:
            if number == runs.latest:
                runs.failed = number
                runs.error = str(error.message) if isinstance(error, gr.Error) else UNEXPECTED
                raise
        else:
            if number == runs.latest:
                return found
        finally:
            if number == runs.under_way:
                runs.under_way = 0
        return (gr.skip(),) * outputs if outputs > 1 else gr.skip()

    # Gradio takes the names of arguments in the API from it.
    own = list(inspect.signature(run).parameters.values())
    after_default = own[-1].default is not inspect.Parameter.empty
    runs = inspect.Parameter(
        "runs",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None if after_default else inspect.Parameter.empty,
    )
    numbered.__signature__ = inspect.Signature([*own, runs])  # type: ignore[attr-defined]
    return numbered


def run_on_new_image(
    shared: Shared,
    images: Sequence[gr.Image],
    model: gr.Dropdown | None,
    run: Callable[..., Any],
    inputs: Sequence[Component],
    results: dict[Any, Any],
    pane: gr.HTML,
    button: gr.Button,
    api_name: str,
    others: Sequence[Component] = (),
    progress: Sequence[Component] = (),
) -> gr.State:
    """Run whenever the images change, and show only the results of the present images.

    A new image or model clears the results and starts a run; the button starts one with other
    settings, and is disabled while an image is missing. Results of earlier runs are not shown. An
    error also clears the results; it is shown once as a message, and stays in ``pane``. A run that
    only a new model causes waits until the tab is shown.

    Args:
        shared: of the tab.
        images: the images; all of them are in ``inputs``, in this order.
        model: the input that selects the model; ``None`` if the results depend on no choice.
        run: takes the values of ``inputs`` and returns the values of the results.
        inputs: all inputs.
        results: components, each with its value while there is no result.
        pane: the one of them that says what to do while there is no result.
        button: starts a run by hand.
        api_name: name of the function in Gradio's API.
        others: further components that a new image or model empties.
        progress: the results that show progress; by default the first.

    Returns:
        The state that holds the :class:`Runs`.
    """
    button.interactive = False
    outputs, blank = list(results), tuple(results.values())
    models = [] if model is None else [model]
    places = [list(inputs).index(image) for image in images]
    of = [*([] if model is None else [list(inputs).index(model)]), *places]

    turn = gr.State(time_to_live=KEPT_S)  # a number, whose change starts a run, too
    runs = gr.State(Runs())  # each session has a copy

    def one_or_all(values: tuple[Any, ...]) -> Any:
        return values if len(values) > 1 else values[0]

    def clear(*values: Any) -> tuple[Any, ...]:
        *chosen, runs = values
        runs.start()
        runs.chosen, runs.is_due = tuple(chosen), True
        return (*blank, *(None for _ in others))

    def clear_if_other(*values: Any) -> Any:
        *chosen, tab_shown, runs = values
        # An upload changes the image twice, to the same file.
        before = runs.chosen
        if before == tuple(chosen):
            return (gr.skip(),) * (len(blank) + len(others) + 1)
        # An image may be sent here from the tab that is shown, which then changes.
        same_images = before is not None and before[len(models) :] == tuple(chosen[len(models) :])
        waits = same_images and tab_shown != shared.tab.label
        return (*clear(*chosen, runs), gr.skip() if waits else runs.latest)

    def run_if_due(runs: Runs) -> Any:
        return runs.latest if runs.is_due else gr.skip()

    def clear_if_failed(runs: Runs) -> Any:
        has_failed = runs.failed == runs.latest
        if not has_failed and not runs.is_due:
            return one_or_all((gr.skip(),) * len(blank))
        # The run has not begun after a restart, or by a full queue or an invalid setting.
        said = (has_failed and runs.error) or NOT_STARTED
        return one_or_all(tuple({**results, pane: problem(said)}.values()))

    @functools.wraps(run)
    def run_if_given(*values: Any) -> Any:
        return one_or_all(blank) if any(values[i] is None for i in places) else run(*values)

    shown: Any = {
        "show_progress_on": list(progress) or outputs[0],
        "trigger_mode": "multiple",
    }
    private: Any = {"api_visibility": "private"}
    quiet: Any = {"show_progress": "hidden", **private}
    count = len(outputs)
    by_hand = button.click(
        latest_only(run, count, of), [*inputs, runs], outputs, api_name=api_name, **shown
    )
    numbered = latest_only(run_if_given, count, of)

    def run_in_turn(*values: Any) -> Any:
        # The choice changed again before this run began: skip it, because the newer one starts its
        # own run. Running both would show the same error twice.
        runs = values[-1]
        if not runs.is_due or runs.chosen != tuple(values[i] for i in of):
            return one_or_all((gr.skip(),) * count)
        runs.is_due = False
        return numbered(*values)

    by_itself = turn.change(run_in_turn, [*inputs, runs], outputs, **shown, **private)
    # Through the queue: without it a change of a state triggers nothing.
    cleared = gr.on(
        [*(image.change for image in images), *(chosen.change for chosen in models)],
        clear_if_other,
        [*models, *images, shared.shown, runs],
        [*outputs, *others, turn],
        trigger_mode="always_last",
        concurrency_limit=None,
        **quiet,
    )
    # A full queue refuses it; the results are then of another image than the one that is shown.
    cleared.failure(
        lambda *values: one_or_all(clear(*values)),
        [*models, *images, runs],
        [*outputs, *others],
        trigger_mode="multiple",
        queue=False,
        **quiet,
    )
    shared.tab.select(run_if_due, runs, turn, concurrency_limit=None, **quiet)
    # In the browser alone: the button is enabled as soon as the image is shown.
    gr.on(
        [image.change for image in images],
        None,
        list(images),
        button,
        js="(...images) => ({ __type__: 'update', interactive: images.every((i) => i !== null) })",
        **private,
    )
    for event in (by_hand, by_itself):
        event.failure(clear_if_failed, runs, outputs, queue=False, **quiet)
    return runs
