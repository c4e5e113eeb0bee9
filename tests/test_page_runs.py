"""The functions that the page calls, without a browser: runs, words, and what is no longer kept."""

from __future__ import annotations

import asyncio
import dataclasses
import html
import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from gradio.context import LocalContext
from gradio.queueing import Event
from gradio.state_holder import SessionState
from PIL import Image

from ade_base.pictures.show import write_png
from ade_client.client import SERVER_ERROR, AdeError, Reconstruction, ScoreResult
from ade_client.contract import Unusual
from serving.engine.bundle import CALIBRATION_NAME, open_bundle
from serving.page import charts
from serving.page.app import build_page
from serving.page.files import write_file
from serving.page.models import RESIZE, Models
from serving.page.runs import NOT_STARTED, Runs, _ImageRuns, is_outdated, latest_only
from serving.page.tab_compare import card
from serving.page.tab_many import scores, summary
from serving.page.tab_reconstruct import in_words
from serving.page.tab_sample import hand_on
from serving.page.verdict import Scored, explained
from tests.browsing import EXAMPLE
from tests.in_process import answered_here, judged, page_function

SKIP = gr.skip()


@pytest.fixture(autouse=True)
def inbox(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "page-files"))


@pytest.fixture
def tiny(tiny_bundle):
    return Models("http://127.0.0.1:1", [open_bundle(tiny_bundle)], None)


def functions(models):
    return list(build_page(models).fns.values())


def blocks(models, kind):
    return [block for block in build_page(models).blocks.values() if isinstance(block, kind)]


def test_a_run_that_a_later_one_overtook_shows_nothing():
    """It shows neither results nor an error."""
    runs = Runs()

    def run(name):
        assert not is_outdated()
        if name.startswith("slow"):
            # Begins while the slow one runs, which may end then.
            assert copy_context().run(numbered, "quick", runs) == "quick"
            assert is_outdated()
        if name.endswith("fails"):
            raise ValueError(name)
        return name

    numbered = latest_only(run, 1)
    assert numbered("first", runs) == "first"
    for name in ("slow", "slow fails"):
        assert numbered(name, runs) == SKIP
    assert runs.failed == 0
    with pytest.raises(ValueError, match="fails"):
        numbered("fails", runs)
    assert runs.failed == runs.latest and "fails" not in runs.error


def test_a_run_whose_tab_was_closed_may_end(tiny):
    """Otherwise thousands of files would keep one of four places."""
    page = build_page(tiny).queue()
    scoring = next(fn for fn in page.fns.values() if fn.api_name == "score_many")
    request: Any = None
    event = Event("closed", scoring, request, None)
    page._queue.active_jobs = [[event]]
    page._queue.event_ids_to_events[event._id] = event
    context = copy_context()
    context.run(LocalContext.blocks.set, page)
    context.run(LocalContext.event_id.set, event._id)
    assert not context.run(is_outdated)
    with ThreadPoolExecutor(1) as pool:  # Playwright runs a loop in this thread
        pool.submit(asyncio.run, page._queue.clean_events(session_hash="closed")).result()
    assert context.run(is_outdated) and not is_outdated()


@pytest.mark.parametrize(
    ("name", "former", "others", "button"),
    [
        ("score", ("tiny", "former.png"), (1, 0.05, True), None),
        ("score_many", ("tiny", ["former.png"], None), (0.1, True, 0.05), "Score all"),
        ("reproduce", ("tiny", "former.png"), (), "the button again"),
        ("sample", ("former",), (1, 7, 1.0, "mean"), None),
    ],
)
def test_a_run_that_waited_is_of_what_is_chosen(name, former, others, button, tiny):
    """It does not start, and so does not replace the newer run of the present choice.

    Where the present choice starts no run by itself, the page says what to do: the button may have
    been pressed before the page's server knew of the choice.
    """
    run, runs = page_function(tiny, name), Runs(chosen=(*former[:-1], "present"))
    if button is None:
        assert set(map(str, run(*former, *others, runs))) == {str(SKIP)}
    else:
        with pytest.raises(gr.Error, match=f"just changed: press {button}"):
            run(*former, *others, runs)
    assert runs.latest == 0


def test_the_events_of_an_image():
    """One run for each choice, and no former results or errors beside another one."""
    ran: list[str] = []

    def run(model, image):
        ran.append(f"{image} of {model}")
        if image == "broken":
            raise gr.Error("Too small.")
        return image

    own, runs = _ImageRuns("Score", run, [0, 1], 1, ("nothing",), 0, 1), Runs()

    def starts(model, image, tab="Score"):
        """Choose an image: whether a run of it starts."""
        *shown, turn = own.clear_if_other(model, image, tab, runs)
        assert shown in (["nothing", None], [SKIP, SKIP])
        return bool(turn == runs.latest)

    assert starts("a", "cat")
    assert not starts("a", "cat")  # an upload changes the image twice, to the same file
    assert own.run_in_turn("a", "cat", runs) == "cat"
    assert own.run_in_turn("a", "cat", runs) == SKIP  # once
    # The run for the removed image shows nothing, and neither does one that came too late.
    assert starts("a", None) and starts("a", "broken")
    assert own.run_in_turn("a", None, runs) == SKIP
    with pytest.raises(gr.Error, match="Too small"):
        own.run_in_turn("a", "broken", runs)
    assert own.run_in_turn("a", "broken", runs) == SKIP
    assert "Too small." in own.clear_if_failed(runs)
    # Another model alone runs when its tab is shown, also if the first one comes back.
    assert not starts("b", "broken", "About")
    assert starts("a", "dog", "About")  # an image that is sent here is seen
    assert not starts("b", "dog", "About") and own.run_if_due(runs) == runs.latest
    # It has not begun: after a restart, or by a full queue.
    assert NOT_STARTED in own.clear_if_failed(runs)
    assert own.run_in_turn("b", "dog", runs) == "dog" and own.run_if_due(runs) == SKIP
    assert own.clear_if_failed(runs) == SKIP
    assert ran == ["cat of a", "broken of a", "dog of b"]
    assert NOT_STARTED in own.clear_if_failed(Runs())  # of a session that the server does not know


def test_clearing_remembers_the_choice(tiny):
    """Of *Score many* and of *Reproduce*: what still runs is of another choice."""
    clearing = [one.fn for one in functions(tiny) if getattr(one.fn, "__name__", "") == "clear"]
    own = [clear for clear in clearing if not hasattr(clear, "__self__")]
    assert len(own) == 2
    for clear in own:
        runs = Runs()
        clear("tiny", "a.png", "b.png", runs)
        assert (runs.chosen, runs.latest) == (("tiny", "a.png", "b.png"), 1)
    failed = next(f.fn for f in functions(tiny) if f.name == "clear_if_failed" and f.targets)
    assert NOT_STARTED in str(failed(Runs()))
    made = {"seed": "7", "index": "0", "n": "1", "temperature": "1", "kind": "mean"}
    data = write_png(np.zeros((8, 8, 3), np.uint8), {f"ade:{k}": v for k, v in made.items()})
    picture, runs = write_file(data, "made.png"), Runs()
    client: Any = SimpleNamespace(sample_png=lambda **_: (data, 7))
    tiny.clients["tiny"] = client
    reproduce = page_function(tiny, "reproduce")
    assert "The same picture" in reproduce("tiny", picture, runs)[1]
    client.sample_png = lambda **_: runs.start() and (data, 7)  # replaced meanwhile
    assert reproduce("tiny", picture, runs) == (SKIP, SKIP)


def test_a_score_that_the_server_has_lost(tiny):
    """Of a tab that was open when the page was started again: it does not stay unexplained."""
    judge = page_function(tiny, "judge_again")
    lost, *others = judge("tiny", None, 0.2, "a.png", Runs())
    assert "has lost this image's score" in html.unescape(lost) and others == ["", "", None, ""]
    ended, failing = Runs(), Runs()
    # While it is scored; afterwards, only the score may have expired.
    during = latest_only(lambda image: judge("tiny", None, 0.2, image, ended), 3)("a.png", ended)
    assert judge("tiny", None, 0.2, "a.png", ended)[0] == lost
    with pytest.raises(ZeroDivisionError):
        latest_only(lambda image: image / 0, 3)(1, failing)
    said = (judge("tiny", None, 0.2, "a.png", runs) for runs in (Runs(is_due=True), failing))
    for shown in (during, *said, judge("tiny", None, 0.2, None, Runs())):
        assert shown == (SKIP,) * 5


def test_only_the_last_look_at_levels_is_shown(tiny, monkeypatch):
    bundle, looks = tiny.bundles["tiny"], Runs()
    eps = [np.zeros((1, *one), np.float32) for one in bundle.latent_shapes]
    tiny.clients["tiny"] = SimpleNamespace(  # type: ignore[assignment]
        encode=lambda *_, **__: SimpleNamespace(eps=eps),
        sample_with=lambda noise: np.zeros((len(noise[0]), *bundle.image_shape), np.uint8),
    )
    given = ("tiny", write_file(EXAMPLE.read_bytes(), "cat.png"), 0, 1, True)
    levels = page_function(tiny, "levels")
    assert all(Path(path).exists() for path in levels(*given, Runs(), looks))
    monkeypatch.setattr("serving.page.tab_explore.noise_of", lambda *_: looks.start() and 1 / 0)
    assert levels(*given, Runs(), looks) == (SKIP, SKIP)


def test_an_emptied_number_beside_a_slider_is_the_minimum(tiny):
    emptied = [one for one in blocks(tiny, gr.Slider) if one.label != "Position"]
    assert emptied and all(one.preprocess(None) == one.minimum for one in emptied)


def with_manifest(bundle, **changes):
    return dataclasses.replace(bundle, manifest={**bundle.manifest, **changes})


def test_a_page_of_models_of_one_level(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    files = {n: its for n, its in bundle.manifest["files"].items() if n != CALIBRATION_NAME}
    flat = with_manifest(bundle, name="flat", latent_shapes=[[3, 8, 8]], files=files)
    for bundles in ([flat], [flat, bundle], [bundle, flat]):
        page = build_page(Models("http://127.0.0.1:1", bundles, None))
        labels = {id_: getattr(block, "label", None) for id_, block in page.blocks.items()}
        # The first model's number of levels is not that of the one with the most.
        loaded = [fn for fn in page.fns.values() if "load" in dict(fn.targets).values()]
        assert ["Latent levels kept"] in [[labels[o._id] for o in fn.outputs] for fn in loaded]
        # No calibration is of resized images, which a later one may be.
        boxes = [block for block in page.blocks.values() if isinstance(block, gr.Checkbox)]
        assert all(box.value for box in boxes if box.label == RESIZE)


@pytest.mark.parametrize("count", [1, 2])
def test_a_failure_of_the_service_is_none_of_a_file(count):
    """A file's own error becomes its row; the service's ends the run, also at the last file."""

    def scored(status, code):
        def score(*args, **options):
            raise AdeError(status, code, "it failed")

        models: Any = SimpleNamespace(clients={"model": SimpleNamespace(score=score)})
        return scores(models, "model", [b""] * count, False, 0.01)

    assert [(one.status, one.code) for one in scored(422, "x")] == [(422, "x")] * count
    for status, code, words in (
        (503, "x", "It failed"),
        (200, SERVER_ERROR, "It failed"),  # of another program
        (412, "other_model", "now has another model. Reload the page"),
    ):
        with pytest.raises(gr.Error, match=words):
            scored(status, code)


def test_reasons_are_counted_at_a_level_that_their_p_values_can_reach():
    """With few calibration images alpha is below the smallest two-sided p-value."""
    few: Any = SimpleNamespace(reference=np.zeros((120, 4)))
    most = [Unusual(name, 9.0, round(2 / 121, 6)) for name in ("bpd", "kl_0")]  # as answered
    rest = [Unusual(name, 0.0, 0.5) for name in ("kl_1", "kl_2")]
    said = charts.reasons(few, [*most, *rest], 0.01)
    assert "2 of 4 measurements</strong> of this image are unusual" in said
    assert "about 0.1 would be" in said  # 4 * 2 / 121
    many: Any = SimpleNamespace(reference=np.zeros((299, 4)))
    assert "0 of 4 measurements" in charts.reasons(many, [*most, *rest], 0.01)
    assert "about 0.1 would be" in charts.reasons(many, rest * 10, 0.01)  # 20 * 2 / 300
    assert "about 2.0 would be" in charts.reasons(many, rest * 10, 0.1)


def test_numbers_that_are_large_or_small(tiny):
    unread = AdeError(415, "x", "x")
    assert "about 200 of 1000 images" in summary(1000 * [judged()], 0.2, 0.1, [3000])
    assert "No verdict on the file: its notes" in summary([unread], 0.01, 0.1, [3000])
    assert "off by 0.26 of 255" in in_words(60.0)
    shown = charts.histogram_chart(np.linspace(3, 5, 100), 4000.0)
    assert len(shown) < 10_000 and ">2000</text>" in shown
    assert charts._ticks(2.9, 5.1) == [3.0, 3.5, 4.0, 4.5, 5.0]
    none = dict.fromkeys(("standard_error", "ood_score", "p_value", "decision_reason", "ood"))
    given: Any = {**none, "bpd": 1.0, "bpd_parts": {}, "decision": "no_verdict"}
    result, data = ScoreResult(**given), write_png(np.zeros((8, 8, 3), np.uint8))
    client: Any = SimpleNamespace(
        score=lambda *args, **options: [result],
        reconstruct=lambda *args, **options: [Reconstruction(png=data, psnr=math.inf)],
    )
    tiny.clients["tiny"] = client
    scored = Scored(dataclasses.replace(result, standard_error=0.00047), resized=False)
    assert "1.000 ± 0.00047 bits" in explained(tiny.calibrations_of("tiny"), scored, 0.01)[0]
    compared = str(card(tiny, "tiny", data, 0.01, False))
    assert "exact reconstruction" in compared and "inf" not in compared


def drew(path):
    with Image.open(path) as picture:
        return str(picture.info["ade:model"]).partition("@")[0]


@pytest.fixture
def two(tiny_bundle, tmp_path):
    """Two models that sample."""
    other = Path(shutil.copytree(tiny_bundle, tmp_path / "other"))
    about = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**about, "name": "other"}))
    with answered_here({"tiny": tiny_bundle, "other": other}, ["sample"]) as url:
        yield Models(url, [open_bundle(tiny_bundle), open_bundle(other)], None)


def test_samples_are_of_the_chosen_model(two):
    """Those of another model are cleared; new ones are drawn when the tab is shown."""
    names = ("sample", "draw_once", "clear_other_samples", "draw_if_shown", "first_ends")
    calls: dict[str, Callable[..., Any]] = {name: page_function(two, name) for name in names}
    settings, runs, nothing = (4, 7, 1.0, "mean"), Runs(), (SKIP,) * 3
    assert drew(calls["sample"]("tiny", *settings, runs)[1]) == "tiny"
    assert calls["draw_once"]([], "tiny", *settings, runs) == nothing
    assert calls["clear_other_samples"]("other", runs)[0] == []
    # Nor is the tab empty when it is opened again while a draw of the former model lasts.
    opening = next(f for f in functions(two) if f.name == "draw_once")
    assert opening.trigger_mode == "multiple"
    # What was asked for before and waited draws nothing.
    assert calls["sample"]("tiny", *settings, runs) == nothing
    # Samples that are shown stay, and with them a choice among them, also after an error.
    assert calls["draw_once"]([("sample.png", None)], "other", *settings, runs) == nothing
    assert drew(calls["draw_once"]([], "other", *settings, runs)[1]) == "other"
    # Another model draws at once where its samples are seen.
    assert calls["clear_other_samples"]("tiny", runs)[0] == []
    assert calls["draw_if_shown"]("Score", [], "tiny", *settings, runs) == nothing
    assert drew(calls["draw_if_shown"]("Sample", [], "tiny", *settings, runs)[1]) == "tiny"
    ends = calls["first_ends"]("other", None, None, 1, 2)
    assert [drew(path) for path in ends] == ["other", "other"]


def test_files_are_not_remembered_for_ever(two):
    page = build_page(two)
    sample = next(fn for fn in page.fns.values() if fn.api_name == "sample")
    state = SessionState(page)
    event = page.process_api(sample, ["tiny", 4, 7, 1.0, "mean", None], state)
    with ThreadPoolExecutor(1) as pool:  # Playwright runs a loop in this thread
        answer = pool.submit(asyncio.run, event).result()
    assert len(answer["data"][0]) == 4
    assert not any(page.temp_file_sets)
    # Nor are the values of components.
    assert not any("value" in config.get("props", {}) for config in state.config_values.values())


def test_what_is_no_longer_kept(tiny):
    """After an hour: the page still shows samples and steps."""
    for call, words in (
        (lambda: page_function(tiny, "again")([], SimpleNamespace(index=0)), "Draw their seed"),
        (lambda: page_function(tiny, "frame_at")(1, None), "Press Explore"),
        (lambda: hand_on(None, "Score"), "no longer kept: click one, or draw the seed again"),
    ):
        with pytest.raises(gr.Error, match=words):
            call()


def test_every_function_has_a_stable_name(service):
    """Calls of one client may overlap; the page itself shows only the latest run of a session."""
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(service.page, verbose=False)
    names = set(client.view_api(return_format="dict")["named_endpoints"])
    expected = ("sample", "explore", "levels", "reconstruct", "score", "score_many", "reproduce")
    assert names == {f"/{name}" for name in (*expected, "about")}
    model = "cifar10-av-ade"
    samples, grid, arrays = client.predict(model, 4, 7, 1.0, "mean", api_name="/sample")
    with Image.open(samples[0]["image"]) as sample, Image.open(grid) as whole:
        assert len(samples) == 4 and sample.size == (32, 32) and whole.size == (64, 64)
    with np.load(arrays) as archive:
        assert archive["images"].shape == (4, 32, 32, 3)
    again, _, _ = client.predict(model, 4, 7, 1.0, "mean", api_name="/sample")
    for first, second in zip(samples, again, strict=True):
        assert Path(first["image"]).read_bytes() == Path(second["image"]).read_bytes()
    with pytest.raises(AppError, match="There is no image yet"):
        client.predict(model, None, 1, 0.01, True, api_name="/score")
    given = (model, handle_file(str(EXAMPLE)), 1, 0.01, True)
    jobs = [client.submit(*given, api_name="/score") for _ in range(2)]
    assert all("ade-verdict" in job.result(60)[0] for job in jobs)
