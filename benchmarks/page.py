"""How quickly the page shows something, and that it is working.

    python -m benchmarks.page URL

Medians of several visits in headless Chromium, each with an empty cache:

- *first view*: from the first byte of the page to the decision's place and the example images;
- *reaction*: from a click on an example image or a button to the first sign of work, and to the
  result.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from benchmarks.screenshots import WAIT_MS, launch, show

# Gradio's mark of a running event, or the result itself where it is quicker.
WORKING = "[role=tabpanel] .wrap.generating, [role=tabpanel] .wrap:not(.hide) .eta-bar, "
WORKING += "[role=tabpanel] .wrap.full:not(.hide), [role=tabpanel] .wrap.translucent:not(.hide)"
WATCH = """(selector) => {
  window.adeSeen = null;
  const look = () => {
    const found = [...document.querySelectorAll(selector)].some((e) => e.offsetParent);
    if (found && window.adeSeen === null) window.adeSeen = performance.now();
    if (window.adeSeen === null) requestAnimationFrame(look);
  };
  document.addEventListener(
    "click", () => { window.adeClicked = performance.now(); look(); }, { capture: true, once: true }
  );
}"""
FIRST_VIEW = """() => document.querySelector(".ade-empty")?.offsetParent
  && [...document.querySelectorAll(".ade-examples img")].filter((i) => i.complete).length >= 12
  && performance.now() - performance.getEntriesByType("navigation")[0].responseStart"""


def first_view(browser: Browser, url: str) -> float:
    """Seconds from the page's first byte to its first meaningful view."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(WAIT_MS)
    page.goto(url, wait_until="commit")
    found = page.wait_for_function(FIRST_VIEW, polling="raf").json_value()
    page.close()
    return float(found) / 1000


def reaction(page: Page, click: Locator, result: Callable[[], None]) -> tuple[float, float]:
    """Seconds from a click to the first sign of work, and to the result."""
    page.evaluate(WATCH, WORKING)
    click.click()
    started = time.monotonic()
    page.wait_for_function("() => window.adeSeen !== null", polling="raf")
    seen = float(page.evaluate("window.adeSeen - window.adeClicked")) / 1000
    result()
    return seen, time.monotonic() - started


def reactions(browser: Browser, url: str) -> dict[str, tuple[float, float]]:
    """Of one visit, by what was clicked."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(WAIT_MS)
    page.goto(url)
    found = {}
    panel = show(page, "Score")
    example = panel.get_by_role("button").filter(has=page.locator("img")).nth(6)
    card = panel.locator(".ade-verdict")
    found["Score, an example"] = reaction(page, example, lambda: expect(card).to_be_visible())
    panel = show(page, "Sample")
    image = panel.locator(".ade-grid img").first
    expect(image).to_be_visible()
    page.wait_for_timeout(1000)
    source = image.get_attribute("src") or ""
    found["Sample, new samples"] = reaction(
        page,
        panel.get_by_role("button", name="Draw new samples"),
        lambda: expect(image).not_to_have_attribute("src", source),
    )
    page.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of a running page")
    parser.add_argument("--visits", type=int, default=5)
    args = parser.parse_args()
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = launch(playwright)
        views = [first_view(browser, args.url) for _ in range(args.visits)]
        print(f"first view: {statistics.median(views):.2f} s, {min(views):.2f} to {max(views):.2f}")
        visits = [reactions(browser, args.url) for _ in range(args.visits)]
        for name in visits[0]:
            seen, done = (statistics.median(v[name][i] for v in visits) for i in (0, 1))
            print(f"{name}: works after {1000 * seen:.0f} ms, result after {done:.2f} s")
        browser.close()


if __name__ == "__main__":
    main()
