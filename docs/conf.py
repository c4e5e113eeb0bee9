"""The site of the documentation, which ``make docs`` builds."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

project = "AV-ADE"
release = metadata.version("av-ade")
root_doc = "index"
exclude_patterns = ["notebooks"]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "_generators.docstrings",
]
suppress_warnings = ["misc.highlighting_failure"]  # of JSON with an ellipsis

html_theme = "furo"
html_title = f"AV-ADE {release}"
html_favicon = "../ade_base/mark.svg"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

myst_heading_anchors = 4  # as forges make them
autodoc_member_order = "bysource"
autodoc_type_aliases = {"Images": "Images", "Kind": "Kind"}
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
napoleon_use_ivar = True


def add_sidebar(app: Any, page: str, source: list[str]) -> None:
    """Make the sidebar from the lists of links on the start page, and of all other pages."""
    if page != root_doc:
        return
    parts = re.split(r"^## (.+)\n", source[0], flags=re.MULTILINE)[1:]
    links = [re.findall(r"\[([^]]+)\]\(([\w/-]+)\.md\)", body) for body in parts[1::2]]
    others = app.env.found_docs - {page, *(path for listed in links for _, path in listed)}
    for title, listed in (*zip(parts[::2], links, strict=True), ("More", [])):
        entries = [f"{text} <{path}>" for text, path in listed] or sorted(others)
        if entries:
            pages = "\n".join(entries)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{pages}\n```\n"


def list_edges(app: Any, page: str, source: list[str]) -> None:
    """Write flowcharts, which forges draw by a script of 3 MB, as lists of their edges."""
    source[0] = re.sub(r"```mermaid\n.*\n((?: .*\n)+)```\n", _edges, source[0])


def _edges(chart: re.Match[str]) -> str:
    labels = re.sub(r"\w+\[(.+?)\]", r"\1", chart[1])
    lines = re.sub(r",?\\n", ", ", labels).replace("-.->", "→").replace("-->", "→")
    return re.sub(r"^ +", "- ", lines, flags=re.MULTILINE)


def setup(app: Any) -> None:
    app.connect("source-read", add_sidebar)
    app.connect("source-read", list_edges)
