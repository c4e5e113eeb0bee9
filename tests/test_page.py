"""The page in Debian's Chromium: the main path and the errors of each tab."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import html
import io
import json
import math
import os
import re
import shutil
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import axe_playwright_python
import gradio as gr
import numpy as np
import pytest
from fastapi.testclient import TestClient
from gradio.context import LocalContext
from gradio.queueing import Event
from gradio.state_holder import SessionState
from PIL import Image, PngImagePlugin
from playwright.sync_api import (
    Browser,
    FilePayload,
    Locator,
    Page,
    Request,
    Route,
    expect,
    sync_playwright,
)

from ade_base.pictures.read import MAX_FILE_BYTES
from ade_base.pictures.show import untile, write_png
from ade_base.tables import safe_cell
from ade_client.client import SERVER_ERROR, AdeClient, AdeError, Reconstruction, ScoreResult
from ade_client.contract import Unusual
from serving.api.latents import with_level
from serving.engine.bundle import CALIBRATION_NAME, open_bundle
from serving.engine.noise import NoiseStream, sample_key
from serving.page import charts
from serving.page.about import PAPER
from serving.page.app import READY_FOR_S, build_page, make_app
from serving.page.drawings import DRAWINGS, draw
from serving.page.files import UPLOADS, write_file
from serving.page.routes import LOGGED_OUT
from serving.page.served import (
    NOT_AN_IMAGE,
    RESIZE,
    RESIZE_INFO,
    Runs,
    Served,
    is_outdated,
    latest_only,
)
from serving.page.sweep import start_sweeping, sweep
from serving.page.tab_compare import _card
from serving.page.tab_explore import VARIATIONS
from serving.page.tab_many import _said, _scores
from serving.page.tab_reconstruct import in_words
from serving.page.tab_sample import hand_on
from serving.page.tab_score import REASONS, Scored, explained
from serving.page.uploads import TOO_MANY
from tests.helpers import PRETRAINED, ROOT
from tests.in_process import answered_here, page_function
from tests.service import RunningService

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
EXAMPLE = ROOT / "serving" / "examples" / "cat.png"
WAIT_MS = 60_000
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Debian's chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """Open a new page that fails on requests to any other server."""
    page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
    page.set_default_timeout(WAIT_MS)
    outside: list[str] = []
    page.on(
        "request",
        lambda r: outside.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None,
    )
    page.goto(url)
    expect(page.get_by_role("tab", name="Sample")).to_be_visible()
    yield page
    page.close()
    assert outside == [], "the page asks an outside host"


@pytest.fixture(scope="module")
def shared_page(browser: Browser, service: RunningService) -> Iterator[Page]:
    with opened(browser, service.page) as page:
        yield page


@pytest.fixture
def page(shared_page: Page) -> Iterator[Page]:
    """The page that most tests share, because opening one takes seconds.

    Images and files stay in it. A test that changes a setting resets it.
    """
    yield shared_page
    shared_page.unroute_all()
    close = "document.querySelectorAll('[data-testid=toast-close]').forEach((one) => one.click())"
    shared_page.evaluate(close)


def show(page: Page, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()


def panel_of(page: Page) -> Locator:
    return page.locator("[role=tabpanel]:visible")


def unfold(panel: Locator, name: str) -> None:
    """Open an accordion, if it is not open."""
    button = panel.locator("button.label-wrap").filter(has=panel.page.get_by_text(name, exact=True))
    if button.get_attribute("aria-expanded") != "true":
        button.click()


def remover(panel: Locator) -> Locator:
    return panel.get_by_label("Remove Image").or_(panel.get_by_role("button", name="Clear")).first


def remove_image(panel: Locator) -> None:
    remover(panel).click()


def drop(panel: Locator, file: Path) -> None:
    """Choose a file in place of the one that is there, if any."""
    chooser = panel.locator("input[type=file]").first
    chooser.or_(remover(panel)).first.wait_for(state="attached")  # the panel may be empty yet
    if not chooser.count():
        remove_image(panel)
    chooser.set_input_files(str(file))


def empty_score(page: Page) -> Locator:
    """The tab Score without an image, as when the page was opened."""
    show(page, "Score")
    panel = panel_of(page)
    panel.get_by_text("Click to Upload").or_(remover(panel)).first.wait_for()
    if remover(panel).count():
        remove_image(panel)
    expect(panel.get_by_text("The verdict appears here")).to_be_visible()
    return panel


def verdict_on(panel: Locator, heading: str, alpha: str) -> Locator:
    """The card of a verdict, with the false-alarm rate that it is for."""
    card = panel.locator(".ade-verdict").filter(has=panel.page.get_by_role("heading", name=heading))
    return card.filter(has_text=f"at least as unusual. False-alarm rate: {alpha}.")


def image_bytes(page: Page, selector: str) -> bytes:
    source = page.locator(selector).first.get_attribute("src")
    assert source is not None
    return page.request.get(source).body()


def test_sample(page: Page, tmp_path: Path) -> None:
    """The tab opens with samples, whose files say how to reproduce them.

    The npz has the same pixels.
    """
    show(page, "Sample")
    panel = panel_of(page)
    samples = panel.locator(".ade-grid img").filter(visible=True)
    expect(samples).to_have_count(16)
    third = Image.open(
        io.BytesIO(page.request.get(samples.nth(2).get_attribute("src") or "").body())
    )
    assert (
        third.format == "PNG" and third.text["ade:seed"] == "7" and third.text["ade:index"] == "2"
    )
    assert third.text["ade:n"] == "1"
    unfold(panel, "More")
    for name in ("png", "npz"):
        with page.expect_download() as download:
            button = f"Download all ({name.upper() if name == 'png' else name})"
            panel.get_by_role("button", name=button).or_(
                panel.get_by_role("link", name=button)
            ).first.click()
        download.value.save_as(tmp_path / f"samples.{name}")
    grid = Image.open(tmp_path / "samples.png")
    assert grid.size == (128, 128) and grid.text["ade:seed"] == "7"
    with np.load(tmp_path / "samples.npz") as arrays:
        assert np.array_equal(arrays["images"][2], np.asarray(third)) and arrays[
            "index"
        ].tolist() == list(range(16))
        assert (
            np.array_equal(untile(np.asarray(grid), 16, (32, 32, 3)), arrays["images"])
            and arrays["seed"] == "7"
        )
    # A chosen one by itself.
    keep = panel.get_by_role("button", name="Download it").or_(
        panel.get_by_role("link", name="Download it")
    )
    expect(keep.first).to_be_disabled()
    samples.nth(2).click()
    expect(keep.first).to_be_enabled()
    with page.expect_download() as download:
        keep.first.click()
    download.value.save_as(tmp_path / "chosen.png")
    chosen = Image.open(tmp_path / "chosen.png")
    assert chosen.text["ade:index"] == "2" and np.array_equal(chosen, third)


def test_new_samples_and_history(page: Page) -> None:
    """Each click draws another seed; the field, the button beside it and the history repeat one."""
    show(page, "Sample")
    panel = panel_of(page)
    first = panel.locator(".ade-grid img").first
    seed = panel.get_by_label("Seed", exact=True)

    def data() -> bytes:
        return page.request.get(first.get_attribute("src") or "").body()

    before = data()
    seeds = []
    for _ in range(2):
        shown = first.get_attribute("src") or ""
        panel.get_by_role("button", name="Draw new samples").click()
        expect(first).not_to_have_attribute("src", shown)
        seeds.append(seed.input_value())
        assert f"sample-{seeds[-1]}-0.png" in (first.get_attribute("src") or "")
    assert len({"7", *seeds}) == 3 and data() != before
    unfold(panel, "Earlier samples of this session")
    past = panel.locator(".ade-grid").nth(1)
    expect(past.locator("img")).to_have_count(3)
    past.locator("button:has(img)").nth(2).click()
    expect(seed).to_have_value("7")
    wait_for(page, lambda: data() == before)
    expect(past.locator("img")).to_have_count(3)
    seed.fill(seeds[0])
    panel.get_by_role("button", name="Draw this seed").click()
    expect(panel.locator(f"img[src*='sample-{seeds[0]}-0.png']")).to_be_visible()
    expect(seed).to_have_value(seeds[0])
    seed.fill("7")
    seed.press("Enter")
    wait_for(page, lambda: data() == before)
    expect(past.locator("img")).to_have_count(3)


def test_an_error_of_sample_is_one_message(page: Page) -> None:
    """The samples that are there stay."""
    show(page, "Sample")
    panel = panel_of(page)
    samples = panel.locator(".ade-grid img").filter(visible=True)
    expect(samples.first).to_be_visible()
    seed = panel.get_by_label("Seed", exact=True)
    before = seed.input_value()
    seed.fill("")
    panel.get_by_role("button", name="Draw this seed").click()
    expect(page.get_by_text("The seed is empty")).to_have_count(1)
    expect(panel.get_by_text("Error", exact=True).filter(visible=True)).to_have_count(0)
    expect(samples.first).to_be_visible()
    seed.fill(before)


def wait_for(page: Page, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_MS / 1000
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_MS} ms"
        page.wait_for_timeout(100)


def test_a_sample_is_sent_to_another_tab(page: Page) -> None:
    """Uses only the keyboard. The other tab gets the sample itself, not an encoding of it."""
    show(page, "Sample")
    chosen = panel_of(page).locator(".ade-grid button:has(img)").nth(5)
    pixels = np.asarray(
        Image.open(
            io.BytesIO(page.request.get(chosen.locator("img").get_attribute("src") or "").body())
        )
    )
    for button in ("Explore from it", "Explore to it"):
        show(page, "Sample")
        unfold(panel_of(page), "More")
        chosen.focus()
        page.keyboard.press("Enter")
        expect(panel_of(page).get_by_role("button", name=button)).to_be_enabled()
        panel_of(page).get_by_role("button", name=button).focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("tab", name="Explore")).to_have_attribute("aria-selected", "true")
    panel = panel_of(page)
    expect(panel.locator("img[src*='sample-7-5']")).to_have_count(2)
    ends = "[role=tabpanel]:visible img[src*='strip.png']"

    def is_of_the_sample() -> bool:
        if not page.locator(ends).count():
            return False
        strip = np.asarray(Image.open(io.BytesIO(image_bytes(page, ends))))
        return np.array_equal(strip[:, :32], pixels) and np.array_equal(strip[:, -32:], pixels)

    wait_for(page, is_of_the_sample)
    for _ in range(2):
        remove_image(panel)


def hold_first_run(page: Page, requests: str = "**/queue/join*") -> list[Route]:
    """Hold back the next run that the page requests; returns a list that its route joins."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)
        if len(held) > 1:
            route.continue_()

    page.route(requests, hold)
    return held


def test_a_sample_that_comes_while_explore_fills_itself_stays(
    browser: Browser, service: RunningService
) -> None:
    """Images that the tab draws when it is opened replace no other image."""
    with opened(browser, service.page) as page:
        show(page, "Sample")
        chosen = panel_of(page).locator(".ade-grid button:has(img)").nth(5)
        chosen.click()
        expect(panel_of(page).get_by_role("button", name="Score it")).to_be_enabled()
        held = hold_first_run(page)
        show(page, "Explore")
        wait_for(page, lambda: bool(held))
        show(page, "Sample")
        unfold(panel_of(page), "More")
        panel_of(page).get_by_role("button", name="Explore from it").click()
        panel = panel_of(page)
        expect(panel.locator("img[src*='sample-7-5']")).to_be_visible()
        held[0].continue_()
        expect(panel.locator("img[src*='seed-2']")).to_be_visible()
        expect(panel.locator("img[src*='strip.png']")).to_be_visible()
        expect(panel.locator("img[src*='sample-7-5']")).to_be_visible()


@pytest.mark.parametrize("side", [0, 1])
def test_a_file_that_is_chosen_while_explore_fills_itself_is_uploaded(
    browser: Browser, service: RunningService, side: int
) -> None:
    """The dialog was opened from an input that the samples have replaced."""
    with opened(browser, service.page) as page:
        held = hold_first_run(page)
        show(page, "Explore")
        wait_for(page, lambda: bool(held))
        panel = panel_of(page)
        with page.expect_file_chooser() as dialog:
            panel.get_by_text("Click to Upload").nth(side).click()
        held[0].continue_()
        drawn = panel.locator("img[src*='seed-']")
        expect(drawn).to_have_count(2)
        dialog.value.set_files(EXAMPLE)
        expect(drawn).to_have_count(1)
        chosen = panel.get_by_alt_text("the chosen image").nth(side)
        expect(chosen).to_have_attribute("src", re.compile(r"/cat\.png$"))


def test_what_is_done_with_a_sample_is_in_view(page: Page) -> None:
    """It is possible only while a sample is chosen."""
    show(page, "Sample")
    panel = panel_of(page)
    sample = panel.locator(".ade-grid button:has(img)").nth(5)

    def draw() -> None:
        shown = sample.locator("img").get_attribute("src") or ""
        panel.get_by_role("button", name="Draw new samples").click()
        expect(sample.locator("img")).not_to_have_attribute("src", shown)

    draw()
    unfold(panel, "More")
    names = ("Score it", "Download it", "Reconstruct it", "Explore from it", "Explore to it")
    buttons = [panel.get_by_role("button", name=name) for name in names]
    for button in buttons:
        expect(button).to_be_disabled()
    page.evaluate("scrollTo(0, 0)")
    for button in buttons[:2]:
        expect(button).to_be_in_viewport(ratio=1)
    sample.click()
    for button in (*buttons[:1], *buttons[2:]):
        expect(button).to_be_enabled()
    draw()
    for button in buttons:
        expect(button).to_be_disabled()


def test_a_chosen_sample_stays_chosen(page: Page) -> None:
    """Visiting another tab does not clear the choice."""
    show(page, "Sample")
    panel_of(page).locator(".ade-grid button:has(img)").nth(5).click()
    for _ in range(2):
        show(page, "Sample")
        page.wait_for_timeout(300)
        panel_of(page).get_by_role("button", name="Score it").click()
        expect(page.get_by_role("tab", name="Score", exact=True)).to_have_attribute(
            "aria-selected", "true"
        )
        expect(panel_of(page).get_by_alt_text("the chosen image")).to_be_visible()
        empty_score(page)


def test_only_the_last_of_several_images_is_shown(page: Page) -> None:
    panel = empty_score(page)
    chosen = panel.locator(".ade-examples button:has(img)")
    for i in (6, 7, 0, 8, 1, 6):
        chosen.nth(i).click()
        page.wait_for_timeout(50)
    expect(panel.get_by_text("resized from 360 x 240")).to_be_visible()
    page.wait_for_timeout(1500)
    expect(panel.get_by_text("resized from 360 x 240")).to_be_visible()
    expect(page.get_by_text("Error", exact=True)).to_have_count(0)


def test_a_click_that_follows_quickly_counts(page: Page) -> None:
    """Even while the one before it is unanswered."""
    show(page, "Score")
    chosen = panel_of(page).locator(".ade-examples button:has(img)")
    held = hold_first_run(page, "**/run/predict*")
    chosen.nth(0).click()
    wait_for(page, lambda: bool(held))
    chosen.nth(1).click()
    held[0].continue_()
    image = panel_of(page).get_by_alt_text("the chosen image")
    expect(image).to_have_attribute("src", re.compile(r"/automobile\.png$"))
    show(page, "Sample")
    samples = panel_of(page).locator(".ade-grid").first.locator("button:has(img)")
    expect(samples).to_have_count(16)
    source = samples.nth(2).locator("img").get_attribute("src") or ""
    page.wait_for_timeout(1000)
    held = hold_first_run(page)
    samples.nth(5).click()
    wait_for(page, lambda: bool(held))
    samples.nth(2).click()
    panel_of(page).get_by_role("button", name="Score it").click()
    expect(panel_of(page).locator(f"img[src*='{Path(source).stem}']")).to_be_visible()
    held[0].continue_()


def test_a_run_that_a_later_one_overtook_shows_nothing() -> None:
    """It shows neither results nor an error."""
    runs = Runs()

    def run(name: str) -> str:
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
        assert numbered(name, runs) == gr.skip()
    assert runs.failed == 0
    with pytest.raises(ValueError, match="fails"):
        numbered("fails", runs)
    assert runs.failed == runs.latest and "fails" not in runs.error


def test_a_run_whose_tab_was_closed_may_end(tiny_bundle: Path) -> None:
    """Otherwise thousands of files would keep one of four places."""
    page = build_page(Served("http://127.0.0.1:1", [open_bundle(tiny_bundle)], None)).queue()
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


def test_a_run_that_waited_is_of_what_is_chosen(tiny_bundle: Path) -> None:
    """It does not start, and so does not replace the newer run of the present choice.

    Where the present choice starts no run by itself, the page says what to do: the button may have
    been pressed before the page's server knew of the choice.
    """
    served = Served("http://127.0.0.1:1", [open_bundle(tiny_bundle)], None)
    for name, former, others, button in (
        ("score", ("tiny", "former.png"), (1, 0.05, True), None),
        ("score_many", ("tiny", ["former.png"], None), (0.1, True, 0.05), "Score all"),
        ("reproduce", ("tiny", "former.png"), (), "the button again"),
        ("sample", ("former",), (1, 7, 1.0, "mean"), None),
    ):
        runs = Runs()
        runs.chosen = (*former[:-1], "present")
        run = page_function(served, name)
        if button is None:
            assert set(map(str, run(*former, *others, runs))) == {str(gr.skip())}, name
        else:
            with pytest.raises(gr.Error, match=f"just changed: press {button}"):
                run(*former, *others, runs)
        assert runs.latest == 0, name
    cleared = [fn.fn for fn in build_page(served).fns.values() if fn.fn is not None]
    remembering = [fn for fn in cleared if fn.__name__ == "clear"]
    assert len(remembering) == 2  # of Score many and of Sample's part Reproduce
    for clear in remembering:
        runs = Runs()
        clear("tiny", "a.png", "b.png", runs)
        assert (runs.chosen, runs.latest) == (("tiny", "a.png", "b.png"), 1)


def test_a_full_queue_does_not_leave_a_former_verdict(page: Page) -> None:
    empty_score(page)
    panel = filled(page, "Score")
    expect(panel.locator(".ade-verdict")).to_be_visible()
    page.route("**/queue/join*", lambda route: route.fulfill(status=503, json={"detail": "full"}))
    panel.locator(".ade-examples button:has(img)").last.click()
    expect(panel.locator(".ade-verdict")).to_have_count(0)
    page.unroute("**/queue/join*")
    panel.get_by_role("button", name="Score", exact=True).click()
    expect(panel.locator(".ade-verdict")).to_be_visible()


def test_a_tab_that_is_no_longer_logged_in(page: Page) -> None:
    """It says so, also at events that are not queued."""
    show(page, "Score")
    refused: Any = {"status": 401, "json": {"detail": LOGGED_OUT}}
    page.route(re.compile("queue/join|run/predict"), lambda route: route.fulfill(**refused))
    panel_of(page).locator(".ade-examples button:has(img)").last.click()
    expect(page.get_by_test_id("toast-text")).to_have_text(LOGGED_OUT)


def test_refused_files_do_not_leave_former_results(page: Page) -> None:
    """The browser names all files when they change, and the page may refuse so many."""
    panel = filled(page, "Score many")
    refused: list[Route] = []

    def refuse_first(route: Route) -> None:
        refused.append(route)
        if len(refused) == 1:
            route.fulfill(status=413, json={"detail": TOO_MANY})
        else:
            route.continue_()

    page.route("**/run/predict*", refuse_first)
    panel.get_by_label("Clear").or_(panel.get_by_label("Remove")).first.click()
    expect(panel.get_by_text(f"The page could not take these files. {TOO_MANY}")).to_be_visible()
    expect(panel.locator(".ade-results tbody tr")).to_have_count(0)
    # The page is shared: it must know again which files are chosen.
    panel.locator("input[type=file]").first.set_input_files(EXAMPLE)
    expect(panel.get_by_text("Verdicts appear here")).to_be_visible()
    panel.get_by_label("Clear").or_(panel.get_by_label("Remove")).first.click()
    wait_for(page, lambda: panel.get_by_role("row").count() == 0)


def decibels(panel: Locator) -> float:
    return float((panel.get_by_text("PSNR").text_content() or "").split()[1])


def test_reconstruct(page: Page) -> None:
    show(page, "Reconstruct")
    panel = panel_of(page)
    expect(page.get_by_role("button", name="Reconstruct", exact=True)).to_be_disabled()
    drop(panel, EXAMPLE)
    expect(panel.get_by_text("root mean square")).to_be_visible()
    for name in ("input.png", "reconstruction.png", "strip.png"):
        expect(panel.locator(f"img[src*='{name}']")).to_be_visible()
    strip = Image.open(
        io.BytesIO(image_bytes(page, "[role=tabpanel]:visible img[src*='strip.png']"))
    )
    assert strip.size == (4 * 32, 32)
    assert np.array_equal(
        np.asarray(strip)[:, -32:], np.asarray(Image.open(EXAMPLE).convert("RGB"))
    )
    unfold(panel, "Technical details")
    expect(panel.locator("svg[aria-label^='bits by latent level: level 0']")).to_be_visible()
    before = decibels(panel)
    panel.get_by_label("number input for Latent levels kept").fill("1")
    page.get_by_role("button", name="Reconstruct", exact=True).click()
    wait_for(page, lambda: decibels(panel) < before - 0.5)


def test_score(page: Page, tmp_path: Path) -> None:
    """A new image is scored without a click: decision, place, heat map, reasons."""
    show(page, "Score")
    panel = panel_of(page)
    drop(panel, EXAMPLE)
    expect(verdict_on(panel, "Accepted", "1 %")).to_be_visible()
    expect(panel.get_by_text("For an in-distribution image, about 0.6 would be")).to_be_visible()
    place = panel.get_by_role("img", name="calibration images by how unusual they are")
    expect(place).to_have_accessible_name(re.compile("; this image is within the level of rej"))
    expect(panel.locator("[aria-live]").filter(has=page.locator(".ade-verdict"))).to_have_count(1)
    heat = Image.open(io.BytesIO(image_bytes(page, "[role=tabpanel]:visible img[src*='map.png']")))
    under = Image.open(
        io.BytesIO(image_bytes(page, "[role=tabpanel]:visible img[src*='image.png']"))
    )
    assert heat.size == under.size == (256, 256) and np.array_equal(
        np.asarray(under)[::8, ::8], np.asarray(Image.open(EXAMPLE).convert("RGB"))
    )
    unfold(panel, "Technical details")
    expect(panel.locator("svg[aria-label^='parts of the score']")).to_be_visible()
    expect(panel.get_by_role("table").get_by_role("row")).to_have_count(1 + REASONS)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    drop(panel, tmp_path / "noise.png")
    expect(verdict_on(panel, "Rejected", "1 %")).to_be_visible()
    expect(place).to_have_accessible_name(re.compile("; this image is beyond the level of rej"))


def test_the_divider_of_two_images_takes_keys(page: Page) -> None:
    """It has a name and a value, and the images have alternative texts."""
    panel = filled(page, "Score")
    divider = panel.get_by_role("slider", name="Divider: Image and unlikely pixels")
    right = panel.get_by_alt_text("unlikely pixels")
    expect(panel.get_by_alt_text("Image", exact=True)).to_be_visible()
    for key, value in (("Home", 0), ("ArrowRight", 5), ("ArrowLeft", 0), ("End", 100)):
        divider.press(key)  # focused again: the page may be drawn again meanwhile
        expect(divider).to_have_attribute("aria-valuenow", f"{value}")
    expect(right).to_have_css("clip-path", "inset(0px 0px 0px 100%)")
    page.evaluate("name_parts()")  # which reads the value from the page
    expect(divider).to_have_attribute("aria-valuenow", "100")


def test_the_page_scrolls_over_two_images(page: Page) -> None:
    """One finger and the wheel scroll; two fingers, and the wheel with Ctrl, zoom."""
    content = filled(page, "Score").locator(".ade-pair .content")
    prevented = """(content, fingers) => {
      const touch = (i) => new Touch({ identifier: i, target: content });
      const touches = Array.from({ length: fingers }, (_, i) => touch(i));
      const start = { touches, bubbles: true, cancelable: true };
      return !content.dispatchEvent(new TouchEvent("touchstart", start));
    }"""
    assert [content.evaluate(prevented, fingers) for fingers in (1, 2)] == [False, True]
    content.scroll_into_view_if_needed()
    content.hover()
    before = page.evaluate("scrollY")
    page.mouse.wheel(0, -100 if before else 100)
    wait_for(page, lambda: page.evaluate("scrollY") != before)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    expect(content.locator("img").first).to_have_css("transform", re.compile(r"matrix\(1\.05"))
    panel_of(page).get_by_role("button", name="Undo").click()


def test_a_new_image_clears_the_old_verdict(page: Page, tmp_path: Path) -> None:
    """So does a removed image, and one that cannot be scored, with a single message."""
    show(page, "Score")
    panel = panel_of(page)
    verdict, waiting = panel.locator(".ade-verdict"), panel.get_by_text("The verdict appears here")
    drop(panel, EXAMPLE)
    expect(verdict_on(panel, "Accepted", "1 %")).to_be_visible()
    remove_image(panel)
    expect(waiting).to_be_visible()
    expect(verdict).to_have_count(0)
    drop(panel, EXAMPLE)
    expect(verdict).to_be_visible()
    (tmp_path / "broken.png").write_bytes(EXAMPLE.read_bytes()[:200])
    drop(panel, tmp_path / "broken.png")
    expect(page.get_by_test_id("toast-text").get_by_text("image is damaged")).to_have_count(1)
    expect(panel.get_by_text("image is damaged")).to_be_visible()
    expect(waiting).to_have_count(0)
    expect(verdict).to_have_count(0)
    # Nor is there anything to judge at another level.
    alpha = panel.get_by_label("number input for False-alarm rate (alpha)")
    for value in ("0.02", "0.01"):
        alpha.fill(value)
        page.wait_for_timeout(500)
    expect(panel.get_by_text("image is damaged")).to_be_visible()
    expect(panel.locator("img[src*='map.png']").filter(visible=True)).to_have_count(0)
    expect(panel.locator(".error")).to_have_count(0)


@pytest.mark.parametrize("late", [False, True])
def test_a_broken_file_that_follows_quickly_fails_once(
    page: Page, tmp_path: Path, late: bool
) -> None:
    """The run for the removed image does not report the next one's error too.

    Not even if it is so late that it starts when the next one's turn has come.
    """
    (tmp_path / "broken.png").write_bytes(b"nothing")
    panel = empty_score(page)
    drop(panel, EXAMPLE)
    expect(panel.locator(".ade-verdict")).to_be_visible()
    calls: list[tuple[int, Route]] = []  # the functions that the page calls, and the requests

    def clears(call: int) -> bool:
        return call == calls[0][0]

    def hold(route: Route) -> None:
        """Hold the first clearing and, if runs are late, the first run."""
        call = json.loads(route.request.post_data or "")["fn_index"]
        calls.append((call, route))
        is_first_run = not clears(call) and sum(not clears(c) for c, _ in calls) == 1
        if len(calls) > 1 and not (late and is_first_run):
            route.continue_()

    page.route("**/queue/join*", hold)
    remove_image(panel)
    wait_for(page, lambda: bool(calls))
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
    expect(panel.get_by_alt_text("the chosen image")).to_have_count(1)
    page.wait_for_timeout(500)
    calls[0][1].continue_()
    messages = page.get_by_test_id("toast-text")
    expect(messages.first).to_be_visible()
    if late:
        next(route for call, route in calls if not clears(call)).continue_()
    page.wait_for_timeout(2000)
    expect(messages).to_have_count(1)
    expect(panel.locator(".ade-unshown")).to_have_count(1)


def test_another_alpha_is_another_verdict_of_the_same_score(
    page: Page, service: RunningService
) -> None:
    show(page, "Score")
    panel = panel_of(page)
    frog = ROOT / "serving" / "examples" / "frog.png"
    with AdeClient(service.url) as client:
        p_value = client.score([frog])[0].p_value
    assert 0.01 < p_value < 0.1
    drop(panel, frog)
    expect(verdict_on(panel, "Accepted", "1 %")).to_be_visible()
    panel.get_by_label("number input for False-alarm rate (alpha)").fill("0.1")
    expect(verdict_on(panel, "Rejected", "10 %")).to_be_visible()
    expect(panel.get_by_text("rejected at 10 %")).to_be_visible()
    panel.get_by_label("number input for False-alarm rate (alpha)").fill("0.01")


def test_a_number_beside_a_slider_can_be_typed(browser: Browser, service: RunningService) -> None:
    """Key by key it is empty, 0 or out of range meanwhile, which is no error."""
    with opened(browser, service.page) as page:

        def type_into(label: str, value: str) -> None:
            number = panel_of(page).get_by_label(f"number input for {label}")
            number.focus()
            for key in ("Control+a", "Backspace", *value):
                number.press(key)
                page.wait_for_timeout(150)
                assert page.get_by_test_id("toast-text").all_inner_texts() == []

        panel = panel_of(page)
        drop(panel, ROOT / "serving" / "examples" / "frog.png")
        expect(verdict_on(panel, "Accepted", "1 %")).to_be_visible()
        unfold(panel, "What if: alarms per day")
        type_into("False-alarm rate (alpha)", "0.05")
        expect(verdict_on(panel, "Rejected", "5 %")).to_be_visible()
        expect(panel.get_by_text("About 50 false alarms per day among 1,000")).to_be_visible()
        show(page, "Explore")
        expect(panel.locator("img[src*='step-4.png']")).to_be_visible()
        type_into("Position", "12")
        expect(panel.locator("img[src*='step-1.png']")).to_be_visible()
        panel.get_by_label("number input for Position").press("Tab")
        expect(panel.locator("img[src*='step-8.png']")).to_be_visible()
        assert page.get_by_test_id("toast-text").all_inner_texts() == []


def test_an_alpha_that_is_moved_while_an_image_is_scored(page: Page) -> None:
    """The verdict is at the level that the page shows."""
    panel = empty_score(page)
    drop(panel, ROOT / "serving" / "examples" / "frog.png")
    expect(verdict_on(panel, "Accepted", "1 %")).to_be_visible()
    held = hold_first_run(page)
    page.get_by_role("button", name="Score", exact=True).click()
    wait_for(page, lambda: bool(held))
    panel.get_by_label("number input for False-alarm rate (alpha)").fill("0.1")
    expect(verdict_on(panel, "Rejected", "10 %")).to_be_visible()
    with page.expect_response(lambda answer: "map.png" in answer.url):
        held[0].continue_()
    page.wait_for_timeout(2000)
    expect(verdict_on(panel, "Rejected", "10 %")).to_be_visible()
    panel.get_by_label("number input for False-alarm rate (alpha)").fill("0.01")


def test_what_if(page: Page) -> None:
    """Moves the level by keyboard alone; what it would mean for a day follows."""
    show(page, "Score")
    panel = panel_of(page)
    unfold(panel, "What if: alarms per day")
    outlook = panel.locator("[aria-live=polite]").filter(has_text="per day").filter(visible=True)
    panel.get_by_label("Images per day").fill("10000")
    level = panel.get_by_role("slider", name="False-alarm rate").first
    level.focus()
    page.keyboard.press("Home")  # 0.001: 3 of 3,001 ranks
    expect(outlook).to_contain_text("About 10 false alarms per day among 10,000")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    expect(outlook).to_contain_text("About 50 false alarms per day among 10,000")
    panel.get_by_label("Images per day").fill("")
    expect(panel.get_by_text("Images per day: a number from 1 to")).to_be_visible()
    panel.get_by_label("Images per day").fill("1000")
    for _ in range(5):
        level.press("ArrowRight")
    expect(outlook).to_contain_text("About 10 false alarms per day among 1,000")


def test_explore(page: Page) -> None:
    show(page, "Explore")
    panel = panel_of(page)
    expect(panel.locator("img[src*='seed-']")).to_have_count(2)
    expect(panel.locator("img[src*='strip.png']")).to_be_visible()
    for _ in range(2):
        remove_image(panel)
    expect(panel.locator("img[src*='strip.png']")).to_have_count(0)
    expect(panel.get_by_text("The interpolation appears here")).to_be_visible()
    unfold(panel, "Choose other images")
    for i in range(2):
        expect(page.get_by_role("button", name="Explore", exact=True)).to_be_disabled()
        panel.get_by_role("button", name="Draw this seed").nth(i).click()
    expect(page.get_by_role("button", name="Explore", exact=True)).to_be_enabled()
    expect(panel.locator("img[src*='seed-']")).to_have_count(2)
    expect(panel.locator("img[src*='strip.png']")).to_be_visible()
    expect(panel.locator("img[src*='step-4.png']")).to_be_visible()
    unfold(panel, "What coarse and fine levels hold")
    expect(panel.locator("img[src*='levels.png']")).to_be_visible()
    strip = Image.open(
        io.BytesIO(image_bytes(page, "[role=tabpanel]:visible img[src*='strip.png']"))
    )
    assert strip.size == (9 * 32, 32) and len(strip.getcolors(10**5) or []) > 50
    panel.get_by_label("number input for Position").fill("8")
    panel.get_by_label("number input for Position").press("Tab")
    expect(panel.locator("img[src*='step-8.png']")).to_be_visible()
    last = np.asarray(
        Image.open(io.BytesIO(image_bytes(page, "[role=tabpanel]:visible img[src*='seed-2.png']")))
    )
    assert np.array_equal(np.asarray(strip)[:, -32:], last)
    moving = page.request.get(
        panel.locator("img[src*='interpolation.webp']").get_attribute("src") or ""
    ).body()
    assert Image.open(io.BytesIO(moving)).n_frames == 16


def test_the_upload_icon_opens_a_dialog(browser: Browser, service: RunningService) -> None:
    """The image stays until another file is chosen."""
    with opened(browser, service.page) as page:
        show(page, "Explore")
        panel = panel_of(page)
        drawn = panel.locator("img[src*='seed-']")
        for side in range(2):
            expect(drawn).to_have_count(2 - side)
            with page.expect_file_chooser() as dialog:
                panel.get_by_label("Upload file").nth(side).click()
            page.wait_for_timeout(500)
            expect(drawn).to_have_count(2 - side)
            dialog.value.set_files(EXAMPLE)
        expect(panel.get_by_alt_text("the chosen image")).to_have_count(2)
        expect(drawn).to_have_count(0)


def test_levels(page: Page, service: RunningService) -> None:
    show(page, "Explore")
    panel = panel_of(page)
    unfold(panel, "The first image, level by level")
    panel.get_by_role("radio", name="2", exact=True).check()
    page.get_by_role("button", name="Show its levels").click()
    expect(panel.locator("img[src*='varied.png']")).to_be_visible()
    first, coarse, varied = (
        np.asarray(
            Image.open(io.BytesIO(image_bytes(page, f"[role=tabpanel]:visible img[src*='{name}']")))
        ).astype(int)
        for name in ("seed-1", "coarse.png", "varied.png")
    )
    pieces = coarse.reshape(32, 3, 32, 3).swapaxes(0, 1)
    assert np.array_equal(pieces[2], first)

    def noise(seed: int, indices: range) -> list[np.ndarray]:
        streams = [NoiseStream(sample_key(seed, i)) for i in indices]
        return [
            np.stack([s.normal(shape) for s in streams])
            for shape in open_bundle(PRETRAINED).latent_shapes
        ]

    own = noise(1, range(1))
    alone = [
        np.concatenate([n * (level <= most) for most in range(3)]) for level, n in enumerate(own)
    ]
    with AdeClient(service.url) as client:
        coarser = client.sample_with(alone)
        expected = client.sample_with(with_level(own, noise(1, range(1, 1 + VARIATIONS)), 2))
    assert np.array_equal(pieces, coarser)
    shown = varied.reshape(32, VARIATIONS, 32, 3).swapaxes(0, 1)
    assert np.array_equal(shown, expected)
    assert not any(np.array_equal(piece, first) for piece in shown)


def test_levels_are_shown_only_of_images_that_were_explored(
    browser: Browser, service: RunningService
) -> None:
    """Before, there is no first image, or the first exploration would empty its levels."""
    with opened(browser, service.page) as page:
        held = hold_first_run(page)
        show(page, "Explore")
        wait_for(page, lambda: bool(held))
        panel = panel_of(page)
        unfold(panel, "The first image, level by level")
        look = page.get_by_role("button", name="Show its levels")
        expect(look).to_be_disabled()
        held[0].continue_()
        look.click()  # as soon as it is enabled
        expect(panel.locator("img[src*='strip.png']")).to_be_visible()
        expect(panel.locator("img[src*='varied.png']")).to_be_visible()
        remove_image(panel)
        expect(look).to_be_disabled()


def test_score_many(page: Page, tmp_path: Path, real_images: np.ndarray) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    for i, pixels in enumerate([*real_images[:6], *noise]):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        for i in range(4):
            archive.write(tmp_path / f"{i}.png", f"inside/{i}.png")
        archive.writestr("notes.txt", "no image")
    show(page, "Score many")
    panel = page.locator("[role=tabpanel]:visible")
    page.get_by_role("button", name="Score all").click()
    expect(page.get_by_text("There are no files yet").first).to_be_visible()
    panel.locator("input[type=file]").first.set_input_files(
        [
            str(tmp_path / name)
            for name in (*(f"{i}.png" for i in range(8)), "broken.png", "more.zip")
        ]
    )
    expect(panel.get_by_role("row", name="more.zip")).to_be_visible()
    page.get_by_role("button", name="Score all").click()
    expect(panel.get_by_role("heading", name="2 of 12 images rejected")).to_be_visible()
    expect(
        panel.get_by_text("At a false-alarm rate of 1 %, about 0.12 of 12 images")
    ).to_be_visible()
    expect(panel.get_by_text("1 of 13 files got no verdict")).to_be_visible()
    expect(panel.get_by_text("2 of 12 images are unusual enough for a list")).to_be_visible()
    table = panel.locator(".ade-results")
    rows = table.locator("tbody tr")
    expect(table.locator("tbody img[src^='data:image/webp']").first).to_be_visible()
    expect(rows).to_have_count(13)
    assert {rows.nth(i).locator("td").nth(1).inner_text() for i in range(2)} == {"6.png", "7.png"}
    expect(rows.nth(12).get_by_role("cell", name="broken.png")).to_be_visible()
    for first, order in (("0.png", "ascending"), ("inside/3.png", "descending")):
        table.get_by_role("button", name="file").click()
        expect(rows.first.locator("td").nth(1)).to_have_text(first)
        expect(table.get_by_role("columnheader", name="file")).to_have_attribute("aria-sort", order)
    table.get_by_role("combobox").select_option("rejected")
    expect(rows).to_have_count(2)
    table.get_by_role("combobox").select_option("all files")
    table.get_by_role("searchbox").fill("inside")
    expect(rows).to_have_count(4)
    expect(table.get_by_text("4 files found, of 13")).to_be_visible()
    # On a phone the rows are cards, without the head of a table.
    page.set_viewport_size({"width": 390, "height": 844})
    expect(table.get_by_role("button", name="file")).to_have_count(0)
    table.get_by_label("Sort by").select_option("file")
    expect(table.get_by_role("row").first.get_by_role("cell").nth(1)).to_have_text("inside/0.png")
    expect(table.get_by_role("table").get_by_role("row")).to_have_count(4)
    page.set_viewport_size({"width": 1280, "height": 900})
    with page.expect_download() as download:
        panel.get_by_role("button", name="Download CSV").or_(
            panel.get_by_role("link", name="Download CSV")
        ).first.click()
    download.value.save_as(tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", newline="") as file:
        found = {row["path"]: row for row in csv.DictReader(file)}
    assert len(found) == 13 and {
        name for name, row in found.items() if row["decision"] == "reject"
    } == {"6.png", "7.png"}
    assert (
        found["broken.png"]["error"] == "not_an_image"
        and found["broken.png"]["notes"] == NOT_AN_IMAGE
    )
    assert found["inside/0.png"]["bpd"] == found["0.png"]["bpd"]
    panel.get_by_label("Clear").or_(panel.get_by_label("Remove")).first.click()
    expect(panel.get_by_text("Verdicts appear here")).to_be_visible()
    expect(panel.get_by_role("heading", name="2 of 12 images rejected")).to_have_count(0)


def test_a_long_table_shows_a_part(page: Page, tmp_path: Path, real_images: np.ndarray) -> None:
    """A thousand rows would take the browser seconds."""
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for i in range(60):
            out = io.BytesIO()
            Image.fromarray(real_images[i]).save(out, "PNG")
            archive.writestr(f"{i}.png", out.getvalue())
    show(page, "Score many")
    panel = panel_of(page)
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "many.zip")
    expect(panel.get_by_role("row", name="many.zip")).to_be_visible()
    page.get_by_role("button", name="Score all").click()
    rows = panel.locator(".ade-results tbody tr")
    expect(rows).to_have_count(50)
    expect(panel.get_by_text("Showing the first 50 of 60 files")).to_be_visible()
    panel.get_by_role("button", name="Show more").click()
    expect(rows).to_have_count(60)
    expect(panel.get_by_text("60 files", exact=True)).to_be_visible()
    panel.get_by_label("Clear").or_(panel.get_by_label("Remove")).first.click()


REPRODUCE = "Reproduce: how was this PNG made?"
HOSTILE = "<img src=x onerror=window.ran=1>"


def test_a_folder_with_other_files_and_hostile_names(page: Page, tmp_path: Path) -> None:
    """Other files of a folder are left out; names stay apart and are never interpreted as HTML."""
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    shutil.copy(EXAMPLE, folder / "cat.png")
    shutil.copy(EXAMPLE, folder / "inside" / "cat.png")
    alike = [shutil.copy(EXAMPLE, tmp_path / name) for name in ("=#1.png", "=1.png", "#.png")]
    (folder / "notes.txt").write_text("no image")
    (folder / "film.mp4").write_bytes(bytes(MAX_FILE_BYTES + 1))  # would have all refused
    with zipfile.ZipFile(tmp_path / "names.zip", "w") as archive:
        archive.write(EXAMPLE, f"{HOSTILE}.png")
        archive.write(EXAMPLE, "=1.png")
    with zipfile.ZipFile(tmp_path / "large.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{HOSTILE}.png", bytes(17 * 2**20))
    text = PngImagePlugin.PngInfo()
    for key in ("seed", "index", "n", "temperature"):
        text.add_text(f"ade:{key}", "1")
    text.add_text(
        "ade:kind",
        f"{HOSTILE}<img src=http://elsewhere.example/a.png>![a](http://elsewhere.example/b.png)",
    )
    Image.open(EXAMPLE).save(tmp_path / "kind.png", pnginfo=text)
    show(page, "Score many")
    panel = panel_of(page)
    panel.locator("input[type=file]").nth(1).set_input_files(folder)
    given = [*alike, tmp_path / "names.zip"]
    panel.locator("input[type=file]").first.set_input_files(given)
    expect(panel.get_by_role("row", name="names.zip")).to_be_visible()
    page.get_by_role("button", name="Score all").click()
    expect(panel.get_by_text("of 7 images rejected")).to_be_visible()
    names = {
        *("cat.png", "cat.png (2)", "=#1.png", "=1.png", "#.png"),
        *(f"{HOSTILE}.png", "=1.png (2)"),
    }
    assert set(panel.locator(".ade-results .ade-file").all_inner_texts()) == names
    with page.expect_download() as download:
        panel.get_by_text("Download CSV").click()
    download.value.save_as(tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == set(map(safe_cell, names))
    panel.get_by_label("Clear").or_(panel.get_by_label("Remove")).first.click()
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "large.zip")
    expect(panel.get_by_role("row", name="large.zip")).to_be_visible()
    page.get_by_role("button", name="Score all").click()
    expect(page.get_by_text(f"{HOSTILE}.png in large.zip is too large").first).to_be_visible()
    show(page, "Sample")
    unfold(panel_of(page), REPRODUCE)
    panel_of(page).locator("input[type=file]").first.set_input_files(tmp_path / "kind.png")
    expect(panel_of(page).get_by_role("row", name="kind.png")).to_be_visible()
    page.get_by_role("button", name="Make it again").click()
    expect(page.get_by_text(f"got '{HOSTILE}").first).to_be_visible()
    page.wait_for_timeout(1000)
    assert page.evaluate("window.ran") is None


def test_examples_of_both_kinds(page: Page, tmp_path: Path) -> None:
    """Half of them are out-of-distribution, of other sizes than the model's.

    A file that is dropped afterwards is still sent unchanged.
    """
    panel = empty_score(page)
    chosen = panel.locator(".ade-examples button:has(img)")
    expect(chosen).to_have_count(12)
    chosen.nth(0).click()
    expect(verdict_on(panel, "Accepted", "1 %")).to_be_visible()
    chosen.nth(6).click()
    expect(verdict_on(panel, "Rejected", "1 %")).to_be_visible()
    expect(panel.get_by_text("resized from 360 x 240")).to_be_visible()
    (tmp_path / "broken.png").write_bytes(b"nothing")
    drop(panel, tmp_path / "broken.png")
    expect(panel.get_by_text(NOT_AN_IMAGE)).to_be_visible()
    drawings = [Image.open(io.BytesIO(draw(name))) for name in DRAWINGS]
    assert all(picture.size != (32, 32) for picture in drawings)


def test_reproduce(page: Page, service: RunningService, tmp_path: Path) -> None:
    with AdeClient(service.url) as client:
        data, _ = client.sample_png(4, seed=11, kind="density")
    (tmp_path / "made.png").write_bytes(data)
    edited = Image.open(io.BytesIO(data))
    edited.putpixel((3, 3), (255, 0, 255))
    text = PngImagePlugin.PngInfo()
    for key, value in edited.info.items():
        text.add_text(key, value)
    edited.save(tmp_path / "edited.png", pnginfo=text)
    text = PngImagePlugin.PngInfo()
    for key, value in {
        **edited.info,
        "ade:model": "![a picture](http://elsewhere.example/a.png)",
    }.items():
        text.add_text(key, value)
    edited.save(tmp_path / "unknown-model.png", pnginfo=text)
    show(page, "Sample")
    panel = panel_of(page)
    unfold(panel, REPRODUCE)
    for name, words in (
        ("made.png", "The same picture, pixel for pixel"),
        ("edited.png", "the picture was changed"),
        ("unknown-model.png", "it was made by an unknown model"),
        (str(EXAMPLE), "does not say how it was made"),
    ):
        if panel.get_by_label("Clear").or_(panel.get_by_label("Remove")).count():
            panel.get_by_label("Clear").or_(panel.get_by_label("Remove")).first.click()
        panel.locator("input[type=file]").first.set_input_files(str(tmp_path / name))
        expect(panel.get_by_role("row", name=Path(name).name)).to_be_visible()
        page.get_by_role("button", name="Make it again").click()
        expect(page.get_by_text(words).first).to_be_visible()
        if "say" not in words:  # otherwise there is a message
            expect(panel.locator("[aria-live]").filter(has_text=words)).to_have_count(1)


def test_a_picture_that_is_replaced_while_it_is_reproduced(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finding about it does not appear beside the new picture."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "page-files"))
    served = Served("http://127.0.0.1:1", [open_bundle(tiny_bundle)], None)
    fns = build_page(served).fns.values()
    reproduce = next(fn for fn in fns if fn.api_name == "reproduce")
    clear = next(fn for fn in fns if fn.outputs == reproduce.outputs and fn is not reproduce)
    assert clear.inputs == reproduce.inputs
    text = {"seed": "7", "index": "0", "n": "1", "temperature": "1", "kind": "mean"}
    data = write_png(np.zeros((8, 8, 3), np.uint8), {f"ade:{k}": v for k, v in text.items()})
    runs, picture = Runs(), write_file(data, "made.png")
    client: Any = SimpleNamespace(sample_png=lambda **_: (data, 7))
    served.clients["tiny"] = client
    assert "The same picture" in reproduce.fn("tiny", picture, runs)[1]
    client.sample_png = lambda **_: clear.fn("tiny", "new.png", runs) and (data, 7)
    assert reproduce.fn("tiny", picture, runs) == (gr.skip(),) * 2


def test_a_session_that_the_server_does_not_know(tiny_bundle: Path) -> None:
    """Of a tab that was open when the page was started again: nothing former stays unexplained."""
    served = Served("http://127.0.0.1:1", [open_bundle(tiny_bundle)], None)
    fns = [fn for fn in build_page(served).fns.values() if fn.fn is not None]
    (judge,) = (fn.fn for fn in fns if fn.fn.__name__ == "judge_again")
    card, *others = judge("tiny", None, 0.2, "a.png", Runs())
    assert "has lost this image's score" in html.unescape(card) and others == ["", ""]
    ended, waiting, failing = Runs(), Runs(), Runs()
    # While it is scored; afterwards, only the score may have expired.
    during = latest_only(lambda image: judge("tiny", None, 0.2, image, ended), 3)("a.png", ended)
    assert judge("tiny", None, 0.2, "a.png", ended)[0] == card
    waiting.is_due = True
    with pytest.raises(ZeroDivisionError):
        latest_only(lambda image: image / 0, 3)(1, failing)
    for said in (during, *(judge("tiny", None, 0.2, "a.png", runs) for runs in (waiting, failing))):
        assert said == (gr.skip(),) * 3
    assert judge("tiny", None, 0.2, None, Runs()) == (gr.skip(),) * 3
    failed = [fn.fn for fn in fns if fn.fn.__name__ == "clear_if_failed"]
    assert failed
    for clear in failed:
        assert "The page could not start this." in str(clear(Runs()))
    due = Runs()
    due.start()
    due.is_due = True
    of_images: list[Any] = [clear for clear in failed if clear.__module__ == "serving.page.served"]
    assert of_images
    for clear in of_images:
        assert "The page could not start this." in str(clear(due))
    due.failed, due.error = due.latest, "Too small."
    for clear in of_images:
        assert "Too small." in str(clear(due))


def test_about(page: Page, service: RunningService) -> None:
    """A card with figures and samples, and the API's reference, folded."""
    show(page, "About")
    panel = panel_of(page)
    about = open_bundle(PRETRAINED).manifest
    for words in (
        f"{about['evaluation']['elbo']['bpd']:.3f}",
        f"{about['calibration']['images']:,} images",
        "What it is good for",
        "45,000 images to train",
        about["licence"],
    ):
        expect(panel.get_by_text(words).first).to_be_visible()
    limits = panel.get_by_role("heading", name="What it is not good for")
    for shown in (limits, panel.get_by_text("To compare likelihoods of different sizes")):
        expect(shown).to_be_in_viewport(ratio=1)
    expect(panel.get_by_alt_text("16 samples of")).to_be_visible()
    panel.get_by_text("How exact the exports are").click()
    expect(panel.get_by_text("of the values one level apart")).to_be_visible()
    panel.get_by_text("POST /predictions/score").click()
    expect(panel.get_by_text(f"write its address instead of {service.url}")).to_be_visible()
    expect(
        panel.get_by_text(f"curl {service.url}/predictions/score -F image=@image.png")
    ).to_be_visible()
    expect(
        panel.get_by_role("cell", name="false-alarm rate: an image is rejected").first
    ).to_be_visible()
    expect(panel.get_by_role("link", name="The paper")).to_have_attribute("href", PAPER)
    href = panel.get_by_role("link", name="OpenAPI document").get_attribute("href")
    assert href == "/openapi.json"
    assert page.request.get(f"{service.page}{href}").json()["openapi"] == "3.1.0"


def test_only_the_last_look_at_levels_is_shown(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "page-files"))
    bundle = open_bundle(tiny_bundle)
    served = Served("http://127.0.0.1:1", [bundle], None)
    looks, shape = Runs(), bundle.image_shape
    served.clients["tiny"] = SimpleNamespace(  # type: ignore[assignment]
        encode=lambda *_, **__: SimpleNamespace(
            eps=[np.zeros((1, *one), np.float32) for one in bundle.latent_shapes]
        ),
        sample_with=lambda noise: np.zeros((len(noise[0]), *shape), np.uint8),
    )
    given = ("tiny", write_file(EXAMPLE.read_bytes(), "cat.png"), 0, 1, True)
    levels = page_function(served, "levels")
    assert all(Path(path).exists() for path in levels(*given, Runs(), looks))
    monkeypatch.setattr("serving.page.tab_explore.noise_of", lambda *_: looks.start() and 1 / 0)
    assert levels(*given, Runs(), looks) == (gr.skip(),) * 2


def test_an_emptied_number_beside_a_slider_is_the_minimum(tiny_bundle: Path) -> None:
    page = build_page(Served("http://127.0.0.1:1", [open_bundle(tiny_bundle)], None))
    sliders = [block for block in page.blocks.values() if isinstance(block, gr.Slider)]
    emptied = {one.label: one.preprocess for one in sliders if one.label != "Position"}
    assert emptied
    for one in sliders:
        if one.label in emptied:
            assert emptied[one.label](None) == one.minimum, one.label  # type: ignore[arg-type]


def test_the_names_of_examples_predict_no_verdict() -> None:
    """Another calibration may be installed while the page runs."""
    page = build_page(Served("http://127.0.0.1:1", [open_bundle(PRETRAINED)], None))
    labels = {block.label for block in page.blocks.values() if isinstance(block, gr.Dataset)}
    assert {"CIFAR-10 photographs", "Drawings, text, noise"} <= labels
    assert not any("distribution" in label for label in labels)


def test_a_page_of_models_of_one_level(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    files = {n: its for n, its in bundle.manifest["files"].items() if n != CALIBRATION_NAME}
    changes = {"name": "flat", "latent_shapes": [[3, 8, 8]], "files": files}
    flat = dataclasses.replace(bundle, manifest={**bundle.manifest, **changes})
    for bundles in ([flat], [flat, bundle], [bundle, flat]):
        page = build_page(Served("http://127.0.0.1:1", bundles, None))
        labels = {id_: getattr(block, "label", None) for id_, block in page.blocks.items()}
        # The first model's number of levels is not that of the one with the most.
        loaded = [fn for fn in page.fns.values() if "load" in dict(fn.targets).values()]
        assert ["Latent levels kept"] in [[labels[o._id] for o in fn.outputs] for fn in loaded]
        # No calibration is of resized images, which a later one may be.
        boxes = [block for block in page.blocks.values() if isinstance(block, gr.Checkbox)]
        assert all(box.value for box in boxes if box.label == RESIZE)


@pytest.mark.parametrize("count", [1, 2])
def test_a_failure_of_the_service_is_none_of_a_file(count: int) -> None:
    """A file's own error becomes its row; the service's ends the run, also at the last file."""

    class Failing:
        def __init__(self, status: int, code: str) -> None:
            self.error = AdeError(status, code, "it failed")

        def score(self, *args: object, **options: object) -> list[ScoreResult]:
            raise self.error

    files = [b""] * count
    own = SimpleNamespace(clients={"model": Failing(422, "x")})
    assert _scores(own, "model", files, False, 0.01) == [own.clients["model"].error] * count
    for status, code in ((503, "x"), (200, SERVER_ERROR)):  # the latter of another program
        services = SimpleNamespace(clients={"model": Failing(status, code)})
        with pytest.raises(gr.Error, match="It failed"):
            _scores(services, "model", files, False, 0.01)
    upgraded = SimpleNamespace(clients={"model": Failing(412, "other_model")})
    with pytest.raises(gr.Error, match="now has another model. Reload the page"):
        _scores(upgraded, "model", files, False, 0.01)


def test_reasons_are_counted_at_a_level_that_their_p_values_can_reach() -> None:
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


def test_numbers_that_are_large_or_small(tiny_bundle: Path) -> None:
    assert "about 200 of 1000 images would be" in _said(1000, [0.5] * 1000, 0, 0, 0.2, 0.1, [3000])
    assert "No verdict on the file: its notes" in _said(1, [], 0, 0, 0.01, 0.1, [3000])
    assert "off by 0.26 of 255" in in_words(60.0)
    shown = charts.histogram_chart(np.linspace(3, 5, 100), 4000.0)
    assert len(shown) < 10_000 and ">2000</text>" in shown
    assert charts._ticks(2.9, 5.1) == [3.0, 3.5, 4.0, 4.5, 5.0]
    pixels = np.zeros((8, 8, 3), np.uint8)
    result = ScoreResult(
        bpd=1.0,
        bpd_parts={},
        standard_error=None,
        ood_score=None,
        p_value=None,
        decision="no_verdict",
        decision_reason=None,
        ood=None,
    )
    served = Served("http://127.0.0.1:1", [open_bundle(tiny_bundle)], None)
    client: Any = SimpleNamespace(
        score=lambda *args, **options: [result],
        reconstruct=lambda *args, **options: [Reconstruction(png=write_png(pixels), psnr=math.inf)],
    )
    served.clients["tiny"] = client
    scored = Scored(dataclasses.replace(result, standard_error=0.00047), resized=False)
    assert "1.000 ± 0.00047 bits" in explained(served.calibrations_of("tiny"), scored, 0.01)[0]
    card = _card(served, "tiny", write_png(pixels), 0.01, False)
    assert "exact reconstruction" in str(card) and "inf" not in str(card)


def test_compare_does_not_depend_on_the_chosen_model(tiny_bundle: Path) -> None:
    bundles = [open_bundle(PRETRAINED), open_bundle(tiny_bundle)]
    page = build_page(Served("http://127.0.0.1:1", bundles, None))
    fns = page.fns.values()
    (model,) = (block for block in page.blocks.values() if getattr(block, "label", "") == "Model")
    scored, compared = (
        next(fn.outputs[0] for fn in fns if fn.api_name == name) for name in ("score", "compare")
    )
    follow = [fn.outputs for fn in fns if (model._id, "change") in fn.targets]
    assert any(scored in outputs for outputs in follow)
    assert not any(compared in outputs for outputs in follow)


def test_samples_are_of_the_chosen_model(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of another model are cleared; new ones are drawn when the tab is shown."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "page-files"))
    other = Path(shutil.copytree(tiny_bundle, tmp_path / "other"))
    about = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**about, "name": "other"}))
    with answered_here({"tiny": tiny_bundle, "other": other}, ["sample"]) as url:
        served = Served(url, [open_bundle(tiny_bundle), open_bundle(other)], None)
        sample, draw_once, clear = (
            page_function(served, name) for name in ("sample", "draw_once", "clear_other_samples")
        )
        settings, runs = (4, 7, 1.0, "mean"), Runs()

        def drew(path: str) -> str:
            with Image.open(path) as picture:
                return str(picture.info["ade:model"]).partition("@")[0]

        assert drew(sample("tiny", *settings, runs)[1]) == "tiny"
        assert draw_once([], "tiny", *settings, runs) == (gr.skip(),) * 3
        assert clear("other", runs)[0] == []
        # Nor is the tab empty when it is opened again while a draw of the former model lasts.
        opening = next(f for f in build_page(served).fns.values() if f.name == "draw_once")
        assert opening.trigger_mode == "multiple"
        # What was asked for before and waited draws nothing.
        assert sample("tiny", *settings, runs) == (gr.skip(),) * 3
        # Samples that are shown stay, and with them a choice among them, also after an error.
        assert draw_once([("sample.png", None)], "other", *settings, runs) == (gr.skip(),) * 3
        assert drew(draw_once([], "other", *settings, runs)[1]) == "other"
        # Another model draws at once where its samples are seen.
        draw_if_shown = page_function(served, "draw_if_shown")
        assert clear("tiny", runs)[0] == []
        assert draw_if_shown("Score", [], "tiny", *settings, runs) == (gr.skip(),) * 3
        assert drew(draw_if_shown("Sample", [], "tiny", *settings, runs)[1]) == "tiny"
        ends = page_function(served, "first_ends")("other", None, None, 1, 2)
        assert [drew(path) for path in ends] == ["other", "other"]


def test_what_is_no_longer_kept(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an hour: the page still shows samples and steps."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "page-files"))
    served = Served("http://127.0.0.1:1", [open_bundle(tiny_bundle)], None)
    with pytest.raises(gr.Error, match="Draw their seed again"):
        page_function(served, "again")([], SimpleNamespace(index=0))
    with pytest.raises(gr.Error, match="Press Explore"):
        page_function(served, "frame_at")(1, None)
    with pytest.raises(gr.Error, match="no longer kept: click one, or draw the seed again"):
        hand_on(None, "Score")


def test_files_are_not_remembered_for_ever(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "page-files"))
    with answered_here({"tiny": tiny_bundle}, ["sample"]) as url:
        page = build_page(Served(url, [open_bundle(tiny_bundle)], None))
        sample = next(fn for fn in page.fns.values() if fn.api_name == "sample")
        given = ["tiny", 4, 7, 1.0, "mean", None]
        state = SessionState(page)
        event = page.process_api(sample, given, state)
        with ThreadPoolExecutor(1) as pool:  # Playwright runs a loop in this thread
            found = pool.submit(asyncio.run, event).result()
    assert len(found["data"][0]) == 4
    assert not any(page.temp_file_sets)
    # Nor are the values of components.
    assert not any("value" in config.get("props", {}) for config in state.config_values.values())


def test_readiness_is_asked_once_for_all_who_wait(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def is_ready(served: Served) -> bool:
        asked.append(time.monotonic())
        time.sleep(0.3)
        return len(asked) > 1

    monkeypatch.setattr(Served, "is_ready", is_ready)
    client = TestClient(make_app("http://127.0.0.1:1", [open_bundle(tiny_bundle)], None))
    with ThreadPoolExecutor(4) as pool:
        assert {answer.status_code for answer in pool.map(client.get, ["/readyz"] * 4)} == {503}
    assert len(asked) == 1
    time.sleep(READY_FOR_S)
    assert client.get("/readyz").json() == {"ready": True} and len(asked) == 2


def test_readiness_under_load_is_what_it_was(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second caller does not find a service unready because its answers take some seconds."""
    monkeypatch.setattr("serving.page.app.READY_FOR_S", 0.0)
    monkeypatch.setattr("serving.page.app.READY_WAIT_S", 0.0)
    asked, answered = threading.Semaphore(0), threading.Event()
    answered.set()

    def is_ready(served: Served) -> bool:
        asked.release()
        return answered.wait(60)

    monkeypatch.setattr(Served, "is_ready", is_ready)
    client = TestClient(make_app("http://127.0.0.1:1", [open_bundle(tiny_bundle)], None))
    assert client.get("/readyz").status_code == 200 and asked.acquire(timeout=60)
    answered.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.get, "/readyz")
        assert asked.acquire(timeout=60)
        second = client.get("/readyz")
        answered.set()
        assert second.json() == first.result().json() == {"ready": True}
    assert second.status_code == 200


def test_readiness_of_a_service_that_hangs(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the caller nor others wait for long, and no thread waits with them."""
    monkeypatch.setattr("serving.page.served.PROBE_TIMEOUT_S", 3.0)
    monkeypatch.setattr("serving.page.app.READY_WAIT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        url = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        client = TestClient(make_app(url, [open_bundle(tiny_bundle)], None))
        started = time.monotonic()

        def ask(_: int) -> tuple[int, float]:
            return client.get("/readyz").status_code, time.monotonic() - started

        with ThreadPoolExecutor(3) as pool:
            answers = sorted(pool.map(ask, range(3)), key=lambda answer: answer[1])
    assert [status for status, _ in answers] == [503] * 3
    assert answers[1][1] < 2.9 < answers[2][1] < 10


def test_files_are_judged_as_they_are(page: Page, service: RunningService, tmp_path: Path) -> None:
    """Nothing is converted before the API's own decoder sees it."""
    picture = Image.open(EXAMPLE).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((32, 32)))
    picture.save(tmp_path / "see through.png")
    with AdeClient(service.url) as client:
        expected = client.score([tmp_path / "see through.png"])[0]
    (tmp_path / "broken.png").write_bytes(EXAMPLE.read_bytes()[:200])
    show(page, "Score")
    panel = panel_of(page)
    for name, words in (
        ("see through.png", f"{expected.bpd:.3f} bits per dimension"),
        ("broken.png", "image is damaged"),
    ):
        drop(panel, tmp_path / name)
        expect(page.get_by_text(words).first).to_be_visible()
        if name != "broken.png":
            expect(panel.get_by_text("alpha composited on white")).to_be_visible()


def test_old_files_go(tmp_path: Path) -> None:
    for name in ("example", "old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "picture.png").write_bytes(b"a picture")
    for name in ("example", "old"):
        os.utime(tmp_path / name, (0, 0))
    sweep(tmp_path, {"example"})
    assert {path.name for path in tmp_path.iterdir()} == {"example", "new"}


def test_the_oldest_files_go_when_all_take_too_much(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "picture.png").write_bytes(bytes(2**20))
        os.utime(tmp_path / f"{i}", (time.time() - 100 + i,) * 2)
    sweep(tmp_path, {"0"}, max_bytes=5 * 2**19)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "2", "3"}


def test_what_a_former_page_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples stay, and the folder of uploads, which both pages use."""
    monkeypatch.setattr("serving.page.sweep.EVERY_S", 0.05)
    for name in ("left", "example", UPLOADS):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    start_sweeping(tmp_path, ["left", UPLOADS])
    deadline = time.monotonic() + 10
    while (tmp_path / "left").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {path.name for path in tmp_path.iterdir()} == {"example", UPLOADS}


def test_sweeping_survives_an_error_and_spares_a_full_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It resumes when the folder of uploads is back, and counts the blocks of small files."""
    monkeypatch.setattr("serving.page.sweep.EVERY_S", 0.05)
    monkeypatch.setattr("serving.page.sweep.MAX_UPLOAD_BYTES", 2 * 4096 * 10)
    start_sweeping(tmp_path, [])
    time.sleep(0.2)  # there are no uploads yet
    for i in range(10):
        (tmp_path / UPLOADS / f"{i}").mkdir(parents=True)
        (tmp_path / UPLOADS / f"{i}" / "picture.png").write_bytes(b"a picture")
    (tmp_path / UPLOADS / "old").mkdir()
    os.utime(tmp_path / UPLOADS / "old", (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / UPLOADS / "old").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {path.name for path in (tmp_path / UPLOADS).iterdir()} == {f"{i}" for i in range(10)}


def test_every_function_has_a_stable_name(service: RunningService) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(service.page, verbose=False)
    names = set(client.view_api(return_format="dict")["named_endpoints"])
    assert names == {
        "/sample",
        "/explore",
        "/levels",
        "/reconstruct",
        "/score",
        "/score_many",
        "/reproduce",
        "/about",
    }
    samples, grid, arrays = client.predict("cifar10-av-ade", 4, 7, 1.0, "mean", api_name="/sample")
    with Image.open(samples[0]["image"]) as sample, Image.open(grid) as whole:
        assert len(samples) == 4 and sample.size == (32, 32) and whole.size == (64, 64)
    with np.load(arrays) as found:
        assert found["images"].shape == (4, 32, 32, 3)
    again, _, _ = client.predict("cifar10-av-ade", 4, 7, 1.0, "mean", api_name="/sample")
    for first, second in zip(samples, again, strict=True):
        assert Path(first["image"]).read_bytes() == Path(second["image"]).read_bytes()
    with pytest.raises(AppError, match="There is no image yet"):
        client.predict("cifar10-av-ade", None, 1, 0.01, True, api_name="/score")


def test_overlapping_calls_of_one_client_all_get_their_results(service: RunningService) -> None:
    """They have one session, in which the page itself shows only the latest run."""
    from gradio_client import Client, handle_file

    client = Client(service.page, verbose=False)
    image = handle_file(str(EXAMPLE))
    jobs = [
        client.submit("cifar10-av-ade", image, 1, 0.01, True, api_name="/score") for _ in range(2)
    ]
    assert all("ade-verdict" in job.result(60)[0] for job in jobs)


def test_errors_are_sentences(page: Page, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.new("RGB", (100, 80)).save(large)
    panel = empty_score(page)
    go = page.get_by_role("button", name="Score", exact=True)
    expect(go).to_be_disabled()
    expect(panel.get_by_text(RESIZE_INFO)).to_be_visible()
    panel.get_by_label(RESIZE).uncheck()
    drop(panel, large)
    message = page.get_by_test_id("toast-text").get_by_text("must be 32 x 32 pixels, got 100 x 80")
    expect(message).to_have_count(1)
    page.get_by_test_id("toast-close").click()
    expect(message).to_have_count(0)
    go.click()
    expect(message).to_have_count(1)
    remove_image(panel)
    expect(go).to_be_disabled()
    panel.get_by_label(RESIZE).check()


FILLED = {  # the result of each tab after its first example is chosen
    "Score": ".ade-verdict",
    "Score many": ".ade-results tbody tr",
    "Sample": ".ade-grid img",
    "Reconstruct": "img[src*='strip.png']",
    "Explore": "img[src*='strip.png']",
    "About": ".ade-samples img",
}


def filled(page: Page, tab: str) -> Locator:
    """A tab with its results."""
    show(page, tab)
    panel = panel_of(page)
    if tab in ("Score", "Reconstruct"):
        panel.locator(".ade-examples button:has(img)").nth(6).click()
    elif tab == "Score many":
        files: list[FilePayload] = [
            {"name": f"{name}.png", "mimeType": "image/png", "buffer": data}
            for name, data in (("broken", b"nothing"), ("noise", draw("noise")))
        ]
        panel.locator("input[type=file]").first.set_input_files(files)
        expect(panel.get_by_role("row", name="noise.png")).to_be_visible()
        panel.get_by_role("button", name="Score all").click()
    expect(panel.locator(FILLED[tab]).filter(visible=True).first).to_be_visible()
    return panel


def wider_than_window(page: Page) -> list[str]:
    """What one would have to scroll sideways for."""
    found: list[str] = page.evaluate(
        """() => [document.documentElement, ...document.querySelectorAll("[role=tabpanel] *")]
        .filter((e) => e.checkVisibility() && !e.closest("svg, pre, .ade-pair"))
        .filter((e) => e.getBoundingClientRect().right > innerWidth + 1
          || (e === document.documentElement && e.scrollWidth > innerWidth)
          || (getComputedStyle(e).overflowX === "auto" && e.scrollWidth > e.clientWidth + 1))
        .map((e) => e.tagName + "." + e.className)"""
    )
    return found


def covered_labels(page: Page) -> list[str]:
    """Labels of charts that a bar of the same chart touches."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll(".ade-chart")].flatMap((chart) =>
          [...chart.querySelectorAll(".ade-axis")].filter((label) => {
            const a = label.getBoundingClientRect();
            return [...chart.querySelectorAll(".ade-bar")].some((bar) => {
              const b = bar.getBoundingClientRect();
              return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
            });
          }).map((label) => label.textContent))"""
    )
    return found


# Gradio's own: the button of its upload area says "Drop Image Here" and is named otherwise, and its
# buttons that add files and that unfold a message hold another control.
GRADIOS_OWN = (
    {"exclude": ["button.icon-button:has(input[type=file])", ".toast-header"]},
    {"rules": {"label-content-name-mismatch": {"enabled": False}}},
)


def serious_findings(page: Page) -> list[Any]:
    """What axe-core, which the page has loaded, reports."""
    # Results are pale until they are updated, and then become dark.
    expect(page.locator(".pending").filter(visible=True)).to_have_count(0)
    page.wait_for_function("!document.getAnimations().some((a) => a instanceof CSSTransition)")
    found = page.evaluate("([context, options]) => axe.run(context, options)", GRADIOS_OWN)
    found = found["violations"]
    return [
        (one["id"], [node["html"][:200] for node in one["nodes"]][:5])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_filled_tabs(browser: Browser, service: RunningService, scheme: str) -> None:
    """Every tab can be reached in a narrow window, and nothing in it is wider than the window.

    axe-core has no serious finding in any. The page follows the reader's colour scheme.
    """
    sizes = [{"width": width, "height": 844} for width in (390, 768)]
    options = {"viewport": sizes[0], "color_scheme": scheme, "reduced_motion": "reduce"}
    with opened(browser, service.page, **options) as page:
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (light == "rgb(245, 245, 241)") == (scheme == "light"), light
        page.add_script_tag(content=AXE.read_text())
        for tab in FILLED:
            page.set_viewport_size(sizes[0])
            panel = filled(page, tab)
            if tab in ("Score", "Reconstruct"):
                unfold(panel, "Technical details")
                heading = re.compile("^(Likelihood|Bits of the image)")
                expect(panel.get_by_role("heading", name=heading)).to_be_visible()
            for size in sizes:
                page.set_viewport_size(size)
                assert wider_than_window(page) == [], (tab, size)
                assert covered_labels(page) == [], (tab, size)
            page.set_viewport_size({"width": 1280, "height": 900})
            assert serious_findings(page) == [], tab


@pytest.fixture(scope="module")
def two_models(tiny_bundle: Path) -> Iterator[RunningService]:
    options = ("--engine", "asgi", "--workers", "1")
    running = RunningService(PRETRAINED, tiny_bundle, options=options)
    yield running
    running.stop()


def test_a_hidden_tab_runs_when_it_is_shown(browser: Browser, two_models: RunningService) -> None:
    """It does not run when the model changes, not even if that comes back to the first model."""
    calls: list[int] = []  # the functions that the page calls

    def note(request: Request) -> None:
        if "/queue/join" in request.url:
            calls.append(json.loads(request.post_data or "")["fn_index"])

    with opened(browser, two_models.page) as page:
        page.on("request", note)
        show(page, "Reconstruct")
        expect(page.get_by_role("button", name="Reconstruct", exact=True)).to_be_visible()
        strip = panel_of(page).locator("img[src*='strip.png']")
        panel_of(page).locator(".ade-examples button:has(img)").first.click()
        expect(strip).to_be_visible()
        run = calls[-1]
        for models in (["tiny"], ["cifar10-av-ade", "tiny"]):
            show(page, "Score many")
            calls.clear()
            for model in models:
                page.get_by_label("Model").first.click()
                page.get_by_role("option", name=model).click()
                page.wait_for_timeout(1000)
            assert run not in calls
            with page.expect_request(lambda _: run in calls):
                show(page, "Reconstruct")
            expect(strip).to_be_visible()


def test_compare(browser: Browser, two_models: RunningService, tmp_path: Path) -> None:
    """One image under two models of different sizes; without resizing, one reports an error."""
    with opened(browser, two_models.page) as page:
        show(page, "Compare")
        panel = panel_of(page)
        expect(page.get_by_role("button", name="Compare", exact=True)).to_be_disabled()
        drop(panel, EXAMPLE)
        expect(panel.get_by_alt_text("Reconstruction by")).to_have_count(2)
        with AdeClient(two_models.url) as client:
            bpd = client.score([EXAMPLE])[0].bpd
        for words in ("cifar10-av-ade, 32 × 32 pixels", "tiny, 8 × 8 pixels", f"{bpd:.3f} bits"):
            expect(panel.get_by_text(words)).to_be_visible()
        expect(verdict_on(panel, "Accepted", "1 %").first).to_be_visible()
        for width in (768, 390):
            page.set_viewport_size({"width": width, "height": 844})
            assert wider_than_window(page) == []
        page.add_script_tag(content=AXE.read_text())
        assert serious_findings(page) == []
        panel.get_by_label(RESIZE).uncheck()
        page.get_by_role("button", name="Compare", exact=True).click()
        expect(panel.get_by_alt_text("Reconstruction by")).to_have_count(1)
        expect(panel.get_by_text("must be 8 x 8 pixels, got 32 x 32")).to_be_visible()
        (tmp_path / "broken.png").write_bytes(b"nothing")
        drop(panel, tmp_path / "broken.png")
        expect(page.get_by_test_id("toast-text").get_by_text(NOT_AN_IMAGE)).to_have_count(1)
        expect(panel.get_by_text(NOT_AN_IMAGE)).to_be_visible()
        expect(panel.get_by_alt_text("Reconstruction by")).to_have_count(0)
        show(page, "Sample")
        page.get_by_label("Model").first.click()
        page.get_by_role("option", name="tiny").click()
        panel = panel_of(page)
        # The other model's samples are drawn at once, of 8 pixels.
        page.wait_for_function(
            "document.querySelector(\"img[src*='sample-7-0']\")?.naturalWidth === 8"
        )
        expect(panel.locator(".ade-grid img").first).to_be_visible()
        unfold(panel, "More")
        panel.locator(".ade-grid button:has(img)").first.click()
        panel.get_by_role("button", name="Compare models on it").click()
        expect(page.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")
        expect(panel_of(page).locator("img[src*='sample-7-0']")).to_be_visible()
