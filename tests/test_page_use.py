"""The page in a browser: results belong to what is shown, whatever a user does meanwhile."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest
from PIL import Image, PngImagePlugin
from playwright.sync_api import Browser, Page, Request, expect

from ade_base.pictures.read import MAX_FILE_BYTES
from ade_client.client import AdeClient
from serving.page.models import NOT_AN_IMAGE, RESIZE
from serving.page.routes import LOGGED_OUT
from serving.page.uploads import TOO_MANY
from tests.browsing import (
    EXAMPLE,
    FILLED,
    FROG,
    button,
    clear_files,
    download,
    drop,
    empty_score,
    examples,
    expect_source,
    expect_verdict,
    filled,
    give_files,
    hold_first,
    number,
    opened,
    remover,
    show,
    shown,
    toast,
    unfold,
    wait_for,
)
from tests.helpers import PRETRAINED
from tests.service import RunningService

AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
HOSTILE = "<img src=x onerror=window.ran=1>"


def test_a_new_image_clears_the_old_verdict(page: Page, tmp_path: Path) -> None:
    """So does a removed image, and one that cannot be scored, with a single message."""
    panel = show(page, "Score")
    verdict, waiting = panel.locator(".ade-verdict"), panel.get_by_text("The verdict appears here")
    drop(panel, EXAMPLE)
    expect_verdict(panel, "Accepted")
    remover(panel).click()
    expect(waiting).to_be_visible()
    expect(verdict).to_have_count(0)
    drop(panel, EXAMPLE)
    expect(verdict).to_be_visible()
    (tmp_path / "broken.png").write_bytes(EXAMPLE.read_bytes()[:200])
    drop(panel, tmp_path / "broken.png")
    expect(toast(page).get_by_text("image is damaged")).to_have_count(1)
    expect(panel.get_by_text("image is damaged")).to_be_visible()
    for nothing in (waiting, verdict, shown(panel, "map.png"), panel.locator(".error")):
        expect(nothing).to_have_count(0)
    # Nor is there anything to judge at another level.
    for value in ("0.02", "0.01"):
        number(panel, "False-alarm rate (alpha)").fill(value)
        page.wait_for_timeout(500)
    expect(panel.get_by_text("image is damaged")).to_be_visible()
    (tmp_path / "nothing.png").write_bytes(b"nothing")
    drop(panel, tmp_path / "nothing.png")
    expect(panel.get_by_text(NOT_AN_IMAGE)).to_be_visible()
    expect(panel.locator(".ade-unshown")).to_have_count(1)


def test_only_the_last_of_several_images_is_shown(page: Page) -> None:
    panel = empty_score(page)
    for i in (6, 7, 0, 8, 1, 6):
        examples(panel).nth(i).click()
        page.wait_for_timeout(50)
    for _ in range(2):
        expect(panel.get_by_text("resized from 360 x 240")).to_be_visible()
        page.wait_for_timeout(1500)
    expect(toast(page)).to_have_count(0)
    # A click counts even while the one before it is unanswered.
    held = hold_first(page, "**/run/predict*")
    examples(panel).nth(0).click()
    wait_for(page, lambda: bool(held))
    examples(panel).nth(1).click()
    held[0].continue_()
    expect_source(panel.get_by_alt_text("the chosen image"), "/automobile.png")


def test_files_are_judged_as_they_are(page: Page, service: RunningService, tmp_path: Path) -> None:
    """Nothing is converted before the API's own decoder sees it."""
    picture = Image.open(EXAMPLE).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((32, 32)))
    picture.save(tmp_path / "see through.png")
    with AdeClient(service.url) as client:
        expected = client.score([tmp_path / "see through.png"])[0]
    panel = show(page, "Score")
    drop(panel, tmp_path / "see through.png")
    expect(panel.get_by_text(f"{expected.bpd:.3f} bits per dimension")).to_be_visible()
    expect(panel.get_by_text("alpha composited on white")).to_be_visible()


def test_an_alpha_that_is_moved_while_an_image_is_scored(page: Page) -> None:
    """The verdict is at the level that the page shows."""
    panel = empty_score(page)
    drop(panel, FROG)
    expect_verdict(panel, "Accepted")
    held = hold_first(page)
    button(panel, "Score").click()
    wait_for(page, lambda: bool(held))
    number(panel, "False-alarm rate (alpha)").fill("0.1")
    expect_verdict(panel, "Rejected", "10 %")
    with page.expect_response(lambda answer: "map.png" in answer.url):
        held[0].continue_()
    page.wait_for_timeout(2000)
    expect_verdict(panel, "Rejected", "10 %")
    number(panel, "False-alarm rate (alpha)").fill("0.01")


def test_a_number_beside_a_slider_can_be_typed(browser: Browser, service: RunningService) -> None:
    """Key by key it is empty, 0 or out of range meanwhile, which is no error."""
    with opened(browser, service.page) as page:
        panel = show(page, "Score")
        drop(panel, FROG)
        expect_verdict(panel, "Accepted")
        show(page, "Explore")
        expect(shown(panel, "step-4.png")).to_be_visible()
        for tab, label, value in (("Score", "False-alarm rate (alpha)", "0.05"),
                                  ("Explore", "Position", "12")):  # fmt: skip
            box = number(show(page, tab), label)
            for key in ("Control+a", "Backspace", *value):
                box.press(key)
                page.wait_for_timeout(150)
        expect(shown(panel, "step-1.png")).to_be_visible()
        number(panel, "Position").press("Tab")
        expect(shown(panel, "step-8.png")).to_be_visible()
        expect_verdict(show(page, "Score"), "Rejected", "5 %")
        expect(toast(page)).to_have_count(0)


def test_a_refused_event_leaves_no_former_results(page: Page) -> None:
    """A full queue, too many files, and a login that has ended."""
    empty_score(page)
    panel = filled(page, "Score")
    page.route("**/queue/join*", lambda route: route.fulfill(status=503, json={"detail": "full"}))
    examples(panel).last.click()
    expect(panel.locator(".ade-verdict")).to_have_count(0)
    page.unroute("**/queue/join*")
    button(panel, "Score").click()
    expect(panel.locator(".ade-verdict")).to_be_visible()
    filled(page, "Score many")
    refused: dict[str, Any] = {"status": 413, "json": {"detail": TOO_MANY}}
    page.route("**/run/predict*", lambda route: route.fulfill(**refused), times=1)
    clear_files(panel)
    expect(panel.get_by_text(f"The page could not take these files. {TOO_MANY}")).to_be_visible()
    expect(panel.locator(".ade-results tbody tr")).to_have_count(0)
    give_files(panel, EXAMPLE)  # the page is shared: it must know again which files are chosen
    expect(panel.get_by_text("Verdicts appear here")).to_be_visible()
    clear_files(panel)
    refused = {"status": 401, "json": {"detail": LOGGED_OUT}}
    page.route(re.compile("queue/join|run/predict"), lambda route: route.fulfill(**refused))
    examples(show(page, "Score")).last.click()
    expect(toast(page).get_by_text(LOGGED_OUT)).to_have_count(1)


def test_what_is_done_with_a_sample(page: Page) -> None:
    """It is in view, possible only while a sample is chosen, and that survives another tab."""
    panel = show(page, "Sample")
    sample = panel.locator(".ade-grid button:has(img)").nth(5)
    unfold(panel, "More")
    names = ("Score it", "Download it", "Reconstruct it", "Explore from it", "Explore to it")
    for _ in range(2):
        source = sample.locator("img").get_attribute("src") or ""
        button(panel, "⚄ Draw new samples").click()
        expect(sample.locator("img")).not_to_have_attribute("src", source)
        for name in names:
            expect(button(panel, name)).to_be_disabled()
        sample.click()
        for name in names:
            expect(button(panel, name)).to_be_enabled()
    page.evaluate("scrollTo(0, 0)")
    for name in names[:2]:
        expect(button(panel, name)).to_be_in_viewport(ratio=1)
    for _ in range(2):
        button(show(page, "Sample"), "Score it").click()
        expect(page.get_by_role("tab", name="Score", exact=True)).to_have_attribute(
            "aria-selected", "true"
        )
        expect(panel.get_by_alt_text("the chosen image")).to_be_visible()
        empty_score(page)


def test_a_sample_that_comes_while_explore_fills_itself_stays(
    browser: Browser, service: RunningService
) -> None:
    """Images that the tab draws when it is opened replace no other image."""
    with opened(browser, service.page) as page:
        panel = show(page, "Sample")
        panel.locator(".ade-grid button:has(img)").nth(5).click()
        expect(button(panel, "Score it")).to_be_enabled()
        held = hold_first(page)
        show(page, "Explore")
        wait_for(page, lambda: bool(held))
        expect(button(panel, "Show its levels")).to_be_hidden()
        unfold(show(page, "Sample"), "More")
        button(panel, "Explore from it").click()
        expect(shown(panel, "sample-7-5")).to_be_visible()
        held[0].continue_()
        for name in ("seed-2", "strip.png", "sample-7-5"):
            expect(shown(panel, name)).to_be_visible()
        # Gradio's own upload icon would only remove the image.
        drawn = shown(panel, "seed-2")
        with page.expect_file_chooser() as dialog:
            panel.get_by_label("Upload file").nth(1).click()
        expect(drawn).to_have_count(1)
        dialog.value.set_files(EXAMPLE)
        expect(drawn).to_have_count(0)
        expect(shown(panel, "cat.png")).to_have_count(1)


def test_two_images_under_a_divider(page: Page) -> None:
    """It has a name, a value and keys. One finger and the wheel scroll the page; two zoom."""
    panel = filled(page, "Score")
    divider = panel.get_by_role("slider", name="Divider: Image and unlikely pixels")
    expect(panel.get_by_alt_text("Image", exact=True)).to_be_visible()
    for key, value in (("Home", 0), ("ArrowRight", 5), ("ArrowLeft", 0), ("End", 100)):
        divider.press(key)  # focused again: the page may be drawn again meanwhile
        expect(divider).to_have_attribute("aria-valuenow", f"{value}")
    right = panel.get_by_alt_text("unlikely pixels")
    expect(right).to_have_css("clip-path", "inset(0px 0px 0px 100%)")
    content = panel.locator(".ade-pair .content")
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
    button(panel, "Undo").click()


def test_a_folder_with_other_files_and_hostile_names(page: Page, tmp_path: Path) -> None:
    """Other files of a folder are left out; names stay apart and are never interpreted as HTML."""
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    for name in ("cat.png", "inside/cat.png"):
        shutil.copy(EXAMPLE, folder / name)
    alike = [Path(shutil.copy(EXAMPLE, tmp_path / name)) for name in ("=#1.png", "=1.png")]
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
    kind = f"{HOSTILE}<img src=http://elsewhere.example/a.png>![a](http://elsewhere.example/b.png)"
    text.add_text("ade:kind", kind)
    Image.open(EXAMPLE).save(tmp_path / "kind.png", pnginfo=text)
    panel = show(page, "Score many")
    panel.locator("input[type=file]").nth(1).set_input_files(folder)
    give_files(panel, *alike, tmp_path / "names.zip")
    button(panel, "Score all").click()
    expect(panel.get_by_text("of 6 images rejected")).to_be_visible()
    names = {"cat.png", "cat.png (2)", "=#1.png", "=1.png", f"{HOSTILE}.png", "=1.png (2)"}
    assert set(panel.locator(".ade-results .ade-file").all_inner_texts()) == names
    table = download(panel, "Download CSV", tmp_path / "scores.csv").read_text()
    assert "'=1.png" in table and "\n=1.png" not in table  # no cell is a formula
    clear_files(panel)
    give_files(panel, tmp_path / "large.zip")
    button(panel, "Score all").click()
    expect(page.get_by_text(f"{HOSTILE}.png in large.zip is too large").first).to_be_visible()
    unfold(show(page, "Sample"), "Reproduce: how was this PNG made?")
    give_files(panel, tmp_path / "kind.png")
    button(panel, "Make it again").click()
    expect(page.get_by_text(f"got '{HOSTILE}").first).to_be_visible()
    page.wait_for_timeout(1000)
    assert page.evaluate("window.ran") is None


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
    return [
        (one["id"], [node["html"][:200] for node in one["nodes"]][:5])
        for one in found["violations"]
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
            panel = filled(page, tab, 0 if scheme == "light" else 6)
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


def choose_model(page: Page, name: str) -> None:
    page.get_by_label("Model").first.click()
    page.get_by_role("option", name=name).click()


def test_two_models(browser: Browser, two_models: RunningService, tmp_path: Path) -> None:
    """One image under both; a tab that is hidden runs for another model when it is shown."""
    calls: list[int] = []  # the functions that the page calls

    def note(request: Request) -> None:
        if "/queue/join" in request.url:
            calls.append(json.loads(request.post_data or "")["fn_index"])

    with opened(browser, two_models.page) as page:
        page.on("request", note)
        panel = filled(page, "Reconstruct")
        run = calls[-1]
        show(page, "Compare")
        go, made = button(panel, "Compare"), panel.get_by_alt_text("Reconstruction by")
        expect(go).to_be_disabled()
        drop(panel, EXAMPLE)
        expect(made).to_have_count(2)
        with AdeClient(two_models.url) as client:
            bpd = client.score([EXAMPLE])[0].bpd
        for words in ("cifar10-av-ade, 32 × 32 pixels", "tiny, 8 × 8 pixels", f"{bpd:.3f} bits"):
            expect(panel.get_by_text(words)).to_be_visible()
        expect_verdict(panel, "Accepted")
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
        drop(panel, tmp_path / "broken.png")
        expect(toast(page).get_by_text(NOT_AN_IMAGE)).to_have_count(1)
        expect(made).to_have_count(0)
        with page.expect_request(lambda _: run in calls):
            show(page, "Reconstruct")
        expect(shown(panel, "strip.png")).to_be_visible()
        # The gate of this model was calibrated on other images than CIFAR-10's photographs.
        expect(examples(show(page, "Score"))).to_have_count(6)
        show(page, "Sample")
        page.wait_for_function(
            "document.querySelector(\"img[src*='sample-7-0']\")?.naturalWidth === 8"
        )
        unfold(panel, "More")
        panel.locator(".ade-grid button:has(img)").first.click()
        button(panel, "Compare models on it").click()
        expect(page.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")
        expect(shown(panel, "sample-7-0")).to_be_visible()
