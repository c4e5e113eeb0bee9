"""Reports as HTML: one frame and the page's look, in one file that needs no other."""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ade_base.brand import MARK, NAME, STYLE
from ade_base.messages import visible

FRAME = "base.html"
BAR = r"\|"  # a bar that does not end a cell
NUMBER = r"[\d–−<>±.\[]"  # how a cell with a number begins


def render(
    title: str,
    verdict: str,
    content: str = "",
    template: str = FRAME,
    package: str = "ade_base",
    filters: dict[str, Callable[..., Any]] | None = None,
    **values: Any,
) -> str:
    """A whole page.

    Args:
        title: of the page.
        verdict: HTML, of :func:`ade_base.brand.verdict_card`; it comes first.
        content: HTML, what the frame itself shows below it.
        template: one that extends the frame.
        package: that has it in its folder ``templates``.
        filters: more of them.
        values: for the template; ``subtitle`` stands below the title. Text is escaped.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("ade_base")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    trusted = {"mark": MARK, "style": STYLE, "verdict": verdict, "content": content}
    return environment.get_template(template).render(
        title=title,
        name=NAME,
        **{"subtitle": "", **values},
        **{key: Markup(value) for key, value in trusted.items()},
    )


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; a cell stays on one line and in its column, whatever it holds.

    The lines may be printed, too, where names must not control the terminal.
    """
    head, *rows = (
        f"| {' | '.join(visible(' '.join(cell.split())).replace('|', BAR) for cell in cells)} |"
        for cells in (header, *body)
    )
    return [head, f"|{'---|' * len(header)}", *rows]


def from_markdown(lines: Sequence[str], pictures: Mapping[str, Path] = {}) -> str:
    """HTML of what our reports write as Markdown: headings, paragraphs, lists, tables, pictures.

    Args:
        lines: without the page's own heading.
        pictures: files that become part of the page, by the name that the lines give them. Other
            names stay text: the name of a data set may look like a picture of any file.
    """
    blocks: list[list[str]] = [[]]
    for line in "\n".join(lines).splitlines():
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return "\n".join(_block(block, pictures) for block in blocks if block)


def _block(lines: list[str], pictures: Mapping[str, Path]) -> str:
    first = lines[0]
    if found := re.fullmatch(r"(##+) (.+)", first):
        level = len(found[1])
        return f"<h{level}>{_inline(found[2], pictures)}</h{level}>"
    if first.startswith("|"):
        return _table(
            [_cells(line) for line in lines if not re.fullmatch(r"[|\-: ]+", line)], pictures
        )
    if first.startswith("- "):
        items = "".join(f"<li>{_inline(line.removeprefix('- '), pictures)}</li>" for line in lines)
        return f"<ul>{items}</ul>"
    return f"<p>{_inline(' '.join(lines), pictures)}</p>"


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [part.strip().replace(BAR, "|") for part in re.split(r"(?<!\\)\|", inner)]


def _table(rows: list[list[str]], pictures: Mapping[str, Path]) -> str:
    head, *body = rows
    # A column whose cells are mostly numbers stands to the right, its heading too.
    numeric = [
        2 * sum(re.match(NUMBER, cell) is not None for cell in column) > sum(map(bool, column))
        for column in zip(*(body or [[""] * len(head)]), strict=False)
    ]

    def row(cells: list[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=ade-number' if is_number else ''}>{_inline(cell, pictures)}</{tag}>"
            for cell, is_number in zip(cells, numeric, strict=False)
        )

    return (
        '<div class="ade-scroll" tabindex="0"><table class="ade-table"><thead><tr>'
        f"{row(head, 'th')}</tr></thead><tbody>"
        + "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in body)
        + "</tbody></table></div>"
    )


def _inline(text: str, pictures: Mapping[str, Path]) -> str:
    """Pictures, code, bold and emphasis of one line."""
    shown = escape(text, quote=False)
    shown = re.sub(
        r"!\[([^\]]*)\]\(([^)]+)\)",
        lambda m: _picture(m[1], pictures[m[2]]) if m[2] in pictures else m[0],
        shown,
    )
    shown = re.sub(r"`([^`]+)`", r"<code>\1</code>", shown)
    shown = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", shown)
    return re.sub(r"(?<![\w*])\*([^*]+)\*(?![\w*])", r"<em>\1</em>", shown)


def _picture(text: str, path: Path) -> str:
    """A picture within the page; nothing, if the file is not there."""
    if not path.is_file():
        return ""
    kind = mimetypes.guess_type(path.name)[0] or "image/webp"
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{text.replace(chr(34), "")}" src="data:{kind};base64,{data}">'
