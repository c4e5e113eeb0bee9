"""Runs of a tab: only the latest one shows its results, and never those of another image."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.context import LocalContext

from serving.page.charts import problem
from serving.page.files import KEPT_S
from serving.page.inputs import TabContext

NOT_STARTED = "The page could not start this. Try again; if that does not help, reload the page."
UNEXPECTED = (
    "Something went wrong on the page. Reload it and try again. If it happens again, tell the "
    "person who runs this service."
)
# Options of events: one that is not in Gradio's API, and one that shows no progress either.
PRIVATE: Any = {"api_visibility": "private"}
QUIET: Any = {**PRIVATE, "show_progress": "hidden"}


@dataclass(eq=False)  # a session's runs are known by identity
class Runs:
    """The runs of a tab in one session.

    Gradio's ``cancels`` are no alternative: they wait for the server, then run the failure
    listeners of the cancelled run, and lose the results of a run that started meanwhile.

    Attributes:
        latest: number of the latest run.
        failed: number of the latest run that failed.
        error: its message.
        chosen: what was last chosen on the page that the results depend on, once it has changed.
        is_due: whether the run that this choice causes has yet to start.
        under_way: the last run that started and has not ended, if any.
    """

    latest: int = 0
    failed: int = 0
    error: str = ""
    chosen: tuple[Any, ...] | None = None
    is_due: bool = False
    under_way: int = 0

    def start(self) -> int:
        """Number a run; from now on, the results of earlier ones are out of date."""
        self.latest += 1
        return self.latest


def one_or_all(values: Sequence[Any]) -> Any:
    """The values of all results, as Gradio takes them: a single one by itself."""
    return tuple(values) if len(values) > 1 else values[0]


def skipped(count: int) -> Any:
    """Leave all results as they are."""
    return one_or_all((gr.skip(),) * count)


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
            return skipped(outputs)
        number = runs.under_way = runs.start()
        _is_outdated.set(lambda: number != runs.latest)
        try:
            results = run(*given)
        except Exception as error:
            if number == runs.latest:
                runs.failed = number
                runs.error = str(error.message) if isinstance(error, gr.Error) else UNEXPECTED
                raise
            return skipped(outputs)
        finally:
            if number == runs.under_way:
                runs.under_way = 0
        return results if number == runs.latest else skipped(outputs)

    # Gradio takes the names of arguments in the API from it.
    own = list(inspect.signature(run).parameters.values())
    default = None if own[-1].default is not inspect.Parameter.empty else inspect.Parameter.empty
    last = inspect.Parameter("runs", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
    numbered.__signature__ = inspect.Signature([*own, last])  # type: ignore[attr-defined]
    return numbered


def error_of(runs: Runs) -> str:
    """The message of the latest run if it failed; otherwise it could not start."""
    return (runs.failed == runs.latest and runs.error) or NOT_STARTED


@dataclass(frozen=True)
class _ImageRuns:
    """What :func:`run_on_new_image` does at the events of its tab.

    Attributes:
        tab: name of the tab.
        run: the function that makes the results.
        of: places of what is chosen among its arguments: the model, if that matters, and images.
        images: number of images among these, which are the last.
        blank: values of the results while there are none.
        pane: which of the results says what to do then.
        others: number of further components that a new image or model empties.
    """

    tab: str
    run: Callable[..., Any]
    of: Sequence[int]
    images: int
    blank: tuple[Any, ...]
    pane: int
    others: int

    def clear(self, *values: Any) -> Any:
        """Remember another choice, of which there are no results yet."""
        *chosen, runs = values
        runs.start()
        runs.chosen, runs.is_due = tuple(chosen), True
        return one_or_all((*self.blank, *(None,) * self.others))

    def clear_if_other(self, *values: Any) -> Any:
        """Clear the results if the choice is another one, and start its run if it is seen."""
        *chosen, tab_shown, runs = values
        before = runs.chosen
        # An upload changes the image twice, to the same file.
        if before == tuple(chosen):
            return skipped(len(self.blank) + self.others + 1)
        # An image may be sent here from the tab that is shown, which then changes.
        same_images = before is not None and before[-self.images :] == tuple(chosen[-self.images :])
        self.clear(*chosen, runs)
        waits = same_images and tab_shown != self.tab
        return (*self.blank, *(None,) * self.others, gr.skip() if waits else runs.latest)

    def run_if_due(self, runs: Runs) -> Any:
        return runs.latest if runs.is_due else gr.skip()

    def run_in_turn(self, *values: Any) -> Any:
        """Run for the present choice, once.

        If the choice changed again before this run began, the newer one starts its own run. Running
        both would show the same error twice.
        """
        runs = values[-1]
        if not runs.is_due or runs.chosen != tuple(values[i] for i in self.of):
            return skipped(len(self.blank))
        runs.is_due = False
        if any(values[i] is None for i in self.of):  # an image was removed
            return skipped(len(self.blank))
        return latest_only(self.run, len(self.blank), self.of)(*values)

    def clear_if_failed(self, runs: Runs) -> Any:
        """Say in place of the results why there are none.

        A run that is due has not begun: after a restart, or by a full queue or an invalid setting.
        """
        if runs.failed != runs.latest and not runs.is_due:
            return skipped(len(self.blank))
        shown = list(self.blank)
        shown[self.pane] = problem(error_of(runs))
        return one_or_all(shown)


def run_on_new_image(
    context: TabContext,
    images: Sequence[gr.Image],
    run: Callable[..., Any],
    inputs: Sequence[Component],
    results: dict[Any, Any],
    pane: gr.HTML,
    button: gr.Button,
    api_name: str,
    *,
    others: Sequence[Component] = (),
    progress: Sequence[Component] = (),
) -> gr.State:
    """Run whenever the images change, and show only the results of the present images.

    A new image, or model if that is among ``inputs``, clears the results and starts a run; the
    button starts one with other settings, and is disabled while an image is missing. Results of
    earlier runs are not shown. An error also clears the results; it is shown once as a message, and
    stays in ``pane``. A run that only a new model causes waits until the tab is shown.

    Args:
        context: of the tab.
        images: the images; all of them are in ``inputs``, in this order.
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
    outputs, given = list(results), list(inputs)
    chosen: list[Any] = [*([context.model] if context.model in given else []), *images]
    of = [given.index(one) for one in chosen]
    blank = tuple(results.values())
    tab = str(context.tab.label)
    own = _ImageRuns(tab, run, of, len(images), blank, outputs.index(pane), len(others))
    turn = gr.State(time_to_live=KEPT_S)  # a number, whose change starts a run, too
    runs = gr.State(Runs())  # each session has a copy
    shown: Any = {"show_progress_on": list(progress) or outputs[0], "trigger_mode": "multiple"}
    by_hand = button.click(
        latest_only(run, len(outputs), of), [*given, runs], outputs, api_name=api_name, **shown
    )
    by_itself = turn.change(own.run_in_turn, [*given, runs], outputs, **shown, **PRIVATE)
    # Through the queue: without it a change of a state triggers nothing.
    cleared = gr.on(
        [one.change for one in chosen],
        own.clear_if_other,
        [*chosen, context.shown, runs],
        [*outputs, *others, turn],
        trigger_mode="always_last",
        concurrency_limit=None,
        **QUIET,
    )
    # A full queue refuses it; the results are then of another image than the one that is shown.
    cleared.failure(
        own.clear,
        [*chosen, runs],
        [*outputs, *others],
        trigger_mode="multiple",
        queue=False,
        **QUIET,
    )
    context.tab.select(own.run_if_due, runs, turn, concurrency_limit=None, **QUIET)
    # In the browser alone: the button is enabled as soon as the image is shown.
    gr.on(
        [image.change for image in images],
        None,
        list(images),
        button,
        js="(...images) => ({ __type__: 'update', interactive: images.every((i) => i !== null) })",
        **PRIVATE,
    )
    for event in (by_hand, by_itself):
        event.failure(own.clear_if_failed, runs, outputs, queue=False, **QUIET)
    return runs
