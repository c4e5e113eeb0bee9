"""The page in a browser: each tab in wide and narrow windows, light and dark, and two models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import expect

from ade_client.client import AdeClient
from serving.page.models import NOT_AN_IMAGE, RESIZE
from tests import browsing as ui
from tests.helpers import PRETRAINED
from tests.service import RunningService

AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")


def wider_than_window(page):
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


def covered_labels(page):
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


def serious_findings(page):
    """What axe-core, which the page has loaded, reports."""
    # Results are pale until they are updated, and then become dark.
    expect(page.locator(".pending").filter(visible=True)).to_have_count(0)
    page.wait_for_function("!document.getAnimations().some((a) => a instanceof CSSTransition)")
    found = page.evaluate("([context, options]) => axe.run(context, options)", GRADIOS_OWN)
    return [
        (one["id"], [node["html"][:200] for node in one["nodes"]][:5])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_filled_tabs(browser, service, scheme):
    """Every tab can be reached in a narrow window, and nothing in it is wider than the window.

    axe-core has no serious finding in any. The page follows the reader's colour scheme.
    """
    sizes = [{"width": width, "height": 844} for width in (390, 768)]
    options = {"viewport": sizes[0], "color_scheme": scheme, "reduced_motion": "reduce"}
    with ui.opened(browser, service.page, **options) as page:
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (light == "rgb(245, 245, 241)") == (scheme == "light"), light
        page.add_script_tag(content=AXE.read_text())
        for tab in ui.FILLED:
            page.set_viewport_size(sizes[0])
            panel = ui.filled(page, tab, 0 if scheme == "light" else 6)
            if tab in ("Score", "Reconstruct"):
                ui.unfold(panel, "Technical details")
                heading = re.compile("^(Likelihood|Bits of the image)")
                expect(panel.get_by_role("heading", name=heading)).to_be_visible()
            for size in sizes:
                page.set_viewport_size(size)
                assert wider_than_window(page) == [], (tab, size)
                assert covered_labels(page) == [], (tab, size)
            page.set_viewport_size({"width": 1280, "height": 900})
            assert serious_findings(page) == [], tab


@pytest.fixture(scope="module")
def two_models(tiny_bundle):
    options = ("--engine", "process", "--workers", "1")
    running = RunningService(PRETRAINED, tiny_bundle, options=options)
    yield running
    running.stop()


def choose_model(page, name):
    page.get_by_label("Model").first.click()
    page.get_by_role("option", name=name).click()


def test_two_models(browser, two_models, tmp_path):
    """One image under both; a tab that is hidden runs for another model when it is shown."""
    calls: list[int] = []  # the functions that the page calls

    def note(request):
        if "/queue/join" in request.url:
            calls.append(json.loads(request.post_data or "")["fn_index"])

    with ui.opened(browser, two_models.page) as page:
        page.on("request", note)
        panel = ui.filled(page, "Reconstruct")
        run = calls[-1]
        ui.show(page, "Compare")
        go, made = ui.button(panel, "Compare"), panel.get_by_alt_text("Reconstruction by")
        expect(go).to_be_disabled()
        ui.drop(panel, ui.EXAMPLE)
        expect(made).to_have_count(2)
        with AdeClient(two_models.url) as client:
            bpd = client.score([ui.EXAMPLE])[0].bpd
        for words in ("cifar10-av-ade, 32 × 32 pixels", "tiny, 8 × 8 pixels", f"{bpd:.3f} bits"):
            expect(panel.get_by_text(words)).to_be_visible()
        ui.expect_verdict(panel, "Accepted")
        for width in (768, 390):
            page.set_viewport_size({"width": width, "height": 844})
            assert wider_than_window(page) == []
        page.add_script_tag(content=AXE.read_text())
        assert serious_findings(page) == []
        page.set_viewport_size({"width": 1280, "height": 900})
        panel.get_by_label(RESIZE).uncheck()
        go.click()
        expect(made).to_have_count(1)
        expect(panel.get_by_text("must be 8 x 8 pixels, got 32 x 32")).to_be_visible()
        calls.clear()
        choose_model(page, "tiny")
        page.wait_for_timeout(1000)
        assert run not in calls
        expect(made).to_have_count(1)  # it does not depend on the chosen model
        (tmp_path / "broken.png").write_bytes(b"nothing")
        ui.drop(panel, tmp_path / "broken.png")
        expect(ui.toast(page).get_by_text(NOT_AN_IMAGE)).to_have_count(1)
        expect(made).to_have_count(0)
        with page.expect_request(lambda _: run in calls):
            ui.show(page, "Reconstruct")
        expect(ui.shown(panel, "strip.png")).to_be_visible()
        # The gate of this model was calibrated on other images than CIFAR-10's photographs.
        expect(ui.examples(ui.show(page, "Score"))).to_have_count(6)
        ui.show(page, "Sample")
        page.wait_for_function(
            "document.querySelector(\"img[src*='sample-7-0']\")?.naturalWidth === 8"
        )
        ui.unfold(panel, "More")
        panel.locator(".ade-grid button:has(img)").first.click()
        ui.button(panel, "Compare models on it").click()
        expect(page.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")
        expect(ui.shown(panel, "sample-7-0")).to_be_visible()
