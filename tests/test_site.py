"""Builds the site of the documentation, follows its links and searches it in a browser."""

from __future__ import annotations

import re
import subprocess
import sys
from urllib.parse import unquote

import pytest

import ade_client
from tests.helpers import ROOT

ELSEWHERE = ("http:", "https:", "data:", "mailto:")


def build(docs, into):
    """As ``make docs`` does."""
    pytest.importorskip("sphinx", reason="Sphinx is not installed: pip install -e '.[docs]'")
    (options,) = re.findall(r"-m sphinx (.+) docs build/docs", (ROOT / "Makefile").read_text())
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *options.split(), docs, into],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    into = tmp_path_factory.mktemp("site")
    built = build(ROOT / "docs", into)
    assert built.returncode == 0, built.stderr
    return into


def test_links_and_what_pages_load_are_part_of_the_site(site):
    texts = {path: path.read_text() for path in site.rglob("*.html")}
    targets = {path: {"", *re.findall(r'\bid="([^"]+)"', text)} for path, text in texts.items()}
    assert len(texts) > 30
    for path, text in texts.items():
        loaded = re.findall(r'<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)="([^"]*)"', text)
        assert not [url for url in loaded if url.startswith((*ELSEWHERE[:2], "//"))], path
        for url in re.findall(r'\b(?:src|href)="([^"]*)"', text):
            if url.startswith(ELSEWHERE):
                continue
            name, _, fragment = unquote(url).partition("#")
            target = (path.parent / name.partition("?")[0]).resolve() if name else path
            assert target.is_file(), f"{path}: {url}"
            assert fragment in targets.get(target, {fragment}), f"{path}: {url}"


def test_the_reference_of_python_is_complete(site):
    python = (site / "reference" / "python.html").read_text()
    assert all(f'id="ade_client.{name}"' in python for name in ade_client.__all__)
    assert "Annotated[" not in python and "false-alarm rate: an image is rejected" in python


def test_a_link_without_a_target_fails(tmp_path):
    (tmp_path / "index.md").write_text("# A\n\n[b](index.md#c)\n")
    config = (ROOT / "docs" / "conf.py").read_text()
    (tmp_path / "conf.py").write_text(config.replace("__file__", repr(str(ROOT / "docs" / "x"))))
    built = build(tmp_path, tmp_path / "out")
    assert built.returncode == 1 and "local id not found" in built.stderr, built.stderr


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_search_and_colours_in_a_browser(site, browser, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / "index.html").as_uri())
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light"), background
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if width == 390:
        page.locator("label.nav-overlay-icon").first.click()  # the search is in the sidebar
    page.locator("input[name=q]").fill("tenants alpha")
    page.locator("input[name=q]").press("Enter")
    page.locator("#search-results a[href*='how-to/calibrate-the-gate.html']").first.wait_for()
    assert all(url.startswith(("file:", "data:")) for url in asked), asked
    page.close()
