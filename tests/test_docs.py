"""What the documentation tells people to type, typed: every Python, JavaScript and curl block of the API's pages."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.service import RunningService

DEFAULT_URL = "http://127.0.0.1:8080"
PAGES = [ROOT / "README.md", ROOT / "docs" / "api.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python(page: Path, service: RunningService, monkeypatch: pytest.MonkeyPatch,
                capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(ROOT)
    found = blocks(page, "python")
    assert found
    for block in found:
        code = block.replace("AdeClient()", f'AdeClient("{DEFAULT_URL}")').replace(DEFAULT_URL, service.url)
        exec(compile(code, str(page), "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_curl(page: Path, service: RunningService, tmp_path: Path) -> None:
    (tmp_path / "serving").symlink_to(ROOT / "serving")
    shutil.copy(ROOT / "serving" / "examples" / "cat.png", tmp_path)
    count = 0
    for block in blocks(page, "bash"):
        if "curl " not in block:
            continue
        count += 1
        subprocess.run(["bash", "-euc", block.replace("curl ", "curl --fail -sS ").replace(DEFAULT_URL, service.url)],
                       cwd=tmp_path, check=True, capture_output=True)
    assert count and Image.open(tmp_path / "reconstruction.png").size == (32, 32)


def test_javascript(service: RunningService) -> None:
    """In a browser, on a page of the service's own origin."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    (block,) = blocks(ROOT / "docs" / "api.md", "javascript")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        lines: list[str] = []
        page.on("console", lambda message: lines.append(message.text))
        page.goto(f"{service.url}/ping")
        page.evaluate("async () => {" + block.replace(DEFAULT_URL, service.url) + "}")
        browser.close()
    bpd, ood = lines[-1].split()
    assert 0 < float(bpd) < 20 and ood in ("true", "false")
