"""Runs the commands, code blocks and notebooks of the documentation."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
import shlex
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ade_base import ports
from ade_cli.main import VERBS, main, parse
from handlers.front.settings import TOKEN_VARIABLE
from handlers.processes import run_folder
from serving.engine.signatures import OPERATIONS
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.conformal import conformal_p_values
from tests.helpers import DATA, PRETRAINED, ROOT, is_of_deleted_extension

DEFAULT_URL = "http://127.0.0.1:8080"
PAGES = [ROOT / "README.md", ROOT / "docs" / "api.md"]
ALL_PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKING_PAGES = [*ALL_PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def without_code(page):
    """A page's text without its blocks and spans of code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page):
    """The fragments that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        found[slug] = found.get(slug, 0) + 1
    return {
        slug if not number else f"{slug}-{number}"
        for slug, count in found.items()
        for number in range(count)
    }


def ade_commands(page):
    """The words of every ``ade …`` in a page's blocks."""
    lines = [
        line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()
    ]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and Path(line[0]).name == "ade"]


def codes_raised_in(paths):
    """The codes of errors that modules answer requests with."""
    raised = r'(?:ApiError\(\s*\d+,|\(\d{3},|unusable\(|ImageError\()\s*"(\w+)"'
    return {code for path in paths for code in re.findall(raised, path.read_text())}


def test_pages_have_commands():
    assert sum(len(ade_commands(page)) for page in ALL_PAGES) >= 12


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_every_command_parses(page):
    """The commands are only parsed here; other tests run them."""
    for words in ade_commands(page):
        if not is_of_deleted_extension(words):
            assert parse(words).verb == words[0]


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_has_a_help_text_and_all_fit_two_screens(verb, monkeypatch):
    parser = argparse.ArgumentParser()
    import_module(VERBS[verb].module).add_arguments(parser)
    monkeypatch.setenv("COLUMNS", "80")
    assert len(parser.format_help().splitlines()) <= 80
    parsers = [parser]
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            else:
                assert action.help, action


@pytest.mark.parametrize("page", LINKING_PAGES, ids=name_of)
def test_links_have_targets(page):
    for target, fragment in re.findall(r"\]\(([^()#\s]*)(?:#([^)\s]*))?\)", without_code(page)):
        if target.startswith("http"):
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not fragment or fragment in anchors(path), f"{target}#{fragment}"


def test_messages_name_pages_that_exist():
    named = set()
    for folder in ("ade_cli", "benchmarks", "export", "fitting", "handlers", "serving", "training"):
        for source in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r"\b(docs/[\w/-]+\.md)(?:#([\w-]+))?", source.read_text()))
    assert ("docs/ood/measurements.md", "few-images") in named
    for page, fragment in named:
        assert (ROOT / page).exists(), page
        assert not fragment or fragment in anchors(ROOT / page), f"{page}#{fragment}"


def test_the_help_of_serve_has_the_ports_and_the_token():
    parser = argparse.ArgumentParser()
    import_module("ade_cli.serve").add_arguments(parser)
    for variable, default in ports.VARIABLES.values():
        assert f"{variable} (default: {default})" in str(parser.description)
    assert TOKEN_VARIABLE in str(parser.description)


def test_operations_lists_every_variable():
    table = (ROOT / "docs" / "operations.md").read_text()
    variables = [variable for variable, _ in ports.VARIABLES.values()]
    for variable in (*variables, TOKEN_VARIABLE, run_folder.VARIABLE, "XDG_CACHE_HOME"):
        assert f"\n| `{variable}` |" in table, variable


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Version 0.2's `ade fit`\n\n```bash\n# a comment\n```\n\n## [A link](page.md), and more\n"
        "## Twice\n## Twice\n## Über_alles – again\n"
    )
    assert anchors(page) == {
        "version-02s-ade-fit",
        "a-link-and-more",
        "twice",
        "twice-1",
        "über_alles--again",
    }


def test_the_contract_names_every_error():
    # Read files themselves, and answer nothing over HTTP; a middleware before other services.
    others = {"bulk.py", "gate.py", "middleware.py"}
    rooms = ("ade_base", "extensions", "handlers", "serving")
    paths = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    paths = [path for path in paths if path.name not in others and path.parent.name != "tests"]
    codes = codes_raised_in(paths)
    text = (ROOT / "docs" / "api.md").read_text()
    assert len(codes) > 25 and not {code for code in codes if f"`{code}`" not in text}


def test_the_gate_of_the_quick_start(service, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Path("serving", "examples").mkdir(parents=True)
    Image.fromarray(noise).save("serving/examples/frog.png")
    (block,) = blocks(ROOT / "docs" / "quickstart.md", "python")
    exec(
        compile(
            block.replace("AdeClient()", f'AdeClient("{service.url}")'), "quickstart.md", "exec"
        ),
        {},
    )
    assert "not what the classifier was made for" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python(page, service, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    found = blocks(page, "python")
    assert found
    for block in found:
        code = block.replace("AdeClient()", f'AdeClient("{DEFAULT_URL}")').replace(
            DEFAULT_URL, service.url
        )
        exec(compile(code, str(page), "exec"), {})
    printed = capsys.readouterr().out
    assert printed and (page.name != "README.md" or "(16, 32, 32, 3)" in printed)


def run_curl(block, service, folder):
    """Run a block of commands in a folder, with the service's address instead of the default.

    Returns:
        What they print.
    """
    command = block.replace("curl ", "curl --fail -sS ").replace(DEFAULT_URL, service.url)
    return subprocess.run(
        ["bash", "-euc", command], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_curl(page, service, tmp_path):
    for folder in ("docs", "serving"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    shutil.copy(ROOT / "serving" / "examples" / "cat.png", tmp_path)
    commands = [block for block in blocks(page, "bash") if "curl " in block]
    assert all(f"/{operation}" in "".join(commands) for operation in OPERATIONS)
    printed = "".join(run_curl(block, service, tmp_path) for block in commands)
    decisions = re.findall(r'"decision": ?"(\w+)"', printed)
    with Image.open(tmp_path / "reconstruction.png") as reconstruction:
        assert reconstruction.size == (32, 32)
    if page.name == "README.md":
        with Image.open(tmp_path / "samples.png") as samples:
            assert samples.text["ade:seed"] == "7"
        assert decisions == ["accept", "reject"]
        (shown,) = re.findall(r'"bpd": ([\d.]+)…, "p_value": ([\d.]+)…, ', page.read_text())
        first, _ = json.JSONDecoder().raw_decode(printed)
        (cat,) = first["results"]
        assert str(cat["bpd"]).startswith(shown[0]) and str(cat["p_value"]).startswith(shown[1])
    else:
        assert decisions == ["accept"]


def test_the_page_on_generating_images(service, tmp_path, monkeypatch, capsys):
    page = ROOT / "docs" / "how-to" / "generate-images.md"
    monkeypatch.chdir(tmp_path)
    for folder in ("serving", "pretrained"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for block in blocks(page, "bash"):
        if "curl " in block:
            run_curl(block, service, tmp_path)
    for words in ade_commands(page):
        assert main(words) == 0
    grids = {name: np.asarray(Image.open(f"{name}.png")) for name in ("samples", "fourth", "mixed")}
    assert (grids["samples"][:32, 96:128] == grids["fourth"]).all()
    assert grids["mixed"].shape == grids["fourth"].shape
    assert np.load("density.npy").shape == (16, 32, 32, 3)
    (block,) = blocks(page, "python")
    code = block.replace("AdeClient()", f'AdeClient("{service.url}")')
    exec(compile(code, str(page), "exec"), {})
    assert "(8, 32, 32, 3)" in capsys.readouterr().out


def test_the_example_of_a_score_is_of_the_shipped_bundle():
    """And as recorded, without most of what explains it."""
    (block,) = blocks(ROOT / "docs" / "api.md", "json")
    shown = json.loads(block.replace(", …]", "]"))
    record = json.loads((DATA / "contract.json").read_text())["answers"]["score: file"]["body"]
    (result,) = record["results"]
    assert shown == {**record, "results": [{**result, "explain": result["explain"][:1]}]}
    calibrations = CalibrationPair.load(PRETRAINED / "calibration.npz")
    assert calibrations.version == result["calibration"]["version"]
    assert calibrations.exact is not None
    (p_value,) = conformal_p_values(calibrations.exact.scores, np.array([result["ood_score"]]))
    assert p_value == result["p_value"]


def test_javascript(service):
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
    bpd, decision = lines[-1].split()
    assert 0 < float(bpd) < 20 and decision in ("accept", "reject")


def test_javascript_in_node(service, tmp_path):
    """As the page says; Playwright brings a Node.js of its own."""
    playwright = pytest.importorskip("playwright")
    node = shutil.which("node") or Path(playwright.__file__).parent / "driver" / "node"
    (block,) = blocks(ROOT / "docs" / "api.md", "javascript")
    (tmp_path / "score.mjs").write_text(block.replace(DEFAULT_URL, service.url))
    done = subprocess.run([node, "score.mjs"], cwd=tmp_path, capture_output=True, text=True)
    assert re.fullmatch(r"\d+\.\d+ (accept|reject)\n", done.stdout), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook):
    """Every cell runs, with outputs of the same kinds as it is committed with."""
    import nbformat
    from nbclient import NotebookClient

    committed = nbformat.read(notebook, nbformat.NO_CONVERT)
    made = copy.deepcopy(committed)
    NotebookClient(
        made, timeout=300, resources={"metadata": {"path": str(notebook.parent)}}
    ).execute()
    for before, after in zip(committed.cells, made.cells, strict=True):
        assert kinds(before) == kinds(after), before.source


def kinds(cell):
    """Of a cell's outputs; what it prints counts once, however many parts it comes in."""
    outputs = (
        (output["output_type"], *sorted(output.get("data", ())))
        for output in cell.get("outputs", [])
    )
    return [kind for kind, _ in itertools.groupby(outputs)]
