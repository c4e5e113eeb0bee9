"""Drives the page in Debian's Chromium."""

from __future__ import annotations

import io
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import FilePayload, Route, expect, sync_playwright

from serving.page.drawings import draw
from tests.helpers import ROOT

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
EXAMPLE = ROOT / "serving" / "examples" / "cat.png"
FROG = EXAMPLE.with_name("frog.png")  # accepted at 1 %, rejected at 10 %
PANEL = "[role=tabpanel]:visible"
WAIT_MS = 60_000
expect.set_options(timeout=WAIT_MS)
FILLED = {  # the result of each tab after its first example is chosen
    "Score": ".ade-verdict",
    "Score many": ".ade-results tbody tr",
    "Sample": ".ade-grid img",
    "Reconstruct": "img[src*='strip.png']",
    "Explore": "img[src*='strip.png']",
    "About": ".ade-samples img",
}


@contextmanager
def chromium():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("Debian's chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser, url, **options):
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


def wait_for(page, condition):
    deadline = time.monotonic() + WAIT_MS / 1000
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_MS} ms"
        page.wait_for_timeout(100)


def hold_first(page, requests="**/queue/join*"):
    """Hold back the next of these requests; returns a list that its route joins."""
    held: list[Route] = []

    def hold(route):
        held.append(route)
        if len(held) > 1:
            route.continue_()

    page.route(requests, hold)
    return held


def show(page, tab):
    """Show a tab; returns what is in it."""
    page.get_by_role("tab", name=tab, exact=True).click()
    return page.locator(PANEL)


def unfold(panel, name):
    """Open an accordion, if it is not open."""
    button = panel.locator("button.label-wrap").filter(has=panel.page.get_by_text(name, exact=True))
    if button.get_attribute("aria-expanded") != "true":
        button.click()


def button(panel, name):
    """A button, which is a link if it downloads a file."""
    own = panel.get_by_role("button", name=name, exact=True)
    return own.or_(panel.get_by_role("link", name=name, exact=True)).first


def number(panel, label):
    """The number beside a slider."""
    return panel.get_by_label(f"number input for {label}")


def shown(panel, name):
    """The images from files with this in their names."""
    return panel.locator(f"img[src*='{name}']").filter(visible=True)


def examples(panel):
    return panel.locator(".ade-examples button:has(img)")


def toast(page):
    return page.get_by_test_id("toast-text")


def download(panel, name, path):
    with panel.page.expect_download() as download:
        button(panel, name).click()
    download.value.save_as(path)
    return path


def image_of(image):
    """The file of an image on the page."""
    data = image.page.request.get(image.first.get_attribute("src") or "").body()
    return Image.open(io.BytesIO(data))


def pixels(image):
    return np.asarray(image_of(image))


def remover(panel):
    return panel.get_by_label("Remove Image").or_(panel.get_by_role("button", name="Clear")).first


def drop(panel, file):
    """Choose a file in place of the one that is there, if any."""
    chooser = panel.locator("input[type=file]").first
    chooser.or_(remover(panel)).first.wait_for(state="attached")  # the panel may be empty yet
    if not chooser.count():
        remover(panel).click()
    chooser.set_input_files(str(file))


def give_files(panel, *files, at=0):
    """Choose files for a list of them, and wait until it shows the last one."""
    given: Sequence[Any] = [str(file) if isinstance(file, Path) else file for file in files]
    panel.locator("input[type=file]").nth(at).set_input_files(given)
    last = files[-1]
    name = last.name if isinstance(last, Path) else last["name"]
    expect(panel.get_by_role("row", name=name)).to_be_visible()


def clear_files(panel):
    panel.get_by_label("Clear").or_(panel.get_by_label("Remove")).first.click()


def empty_score(page):
    """The tab Score without an image, as when the page was opened."""
    panel = show(page, "Score")
    panel.get_by_text("Click to Upload").or_(remover(panel)).first.wait_for()
    if remover(panel).count():
        remover(panel).click()
    expect(panel.get_by_text("The verdict appears here")).to_be_visible()
    return panel


def filled(page, tab, example=0):
    """A tab with its results."""
    panel = show(page, tab)
    if tab in ("Score", "Reconstruct"):
        examples(panel).nth(example).click()
    elif tab == "Score many":
        files: list[FilePayload] = [
            {"name": f"{name}.png", "mimeType": "image/png", "buffer": data}
            for name, data in (("broken", b"nothing"), ("noise", draw("noise")))
        ]
        give_files(panel, *files)
        button(panel, "Score all").click()
    expect(panel.locator(FILLED[tab]).filter(visible=True).first).to_be_visible()
    return panel


def expect_verdict(panel, heading, alpha="1 %"):
    """Expect the card of a verdict, with the false-alarm rate that it is for."""
    card = panel.locator(".ade-verdict").filter(has=panel.page.get_by_role("heading", name=heading))
    text = f"at least as unusual. False-alarm rate: {alpha}."
    expect(card.filter(has_text=text).first).to_be_visible()


def expect_source(image, end):
    expect(image).to_have_attribute("src", re.compile(re.escape(end) + "$"))
