"""Cells of CSV files that are safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

# From OWASP's page on CSV injection; Japanese and Chinese keyboards type the full-width forms.
FORMULA_STARTS = "=+-@\t\r\n＝＋－＠"
# Where a cell of a formula may begin: spreadsheets of some languages split lines at semicolons, and
# some drop spaces and quotes before they look at the first character.
_FORMULA = re.compile(r"""(?:^|(?<=[;\t\r\n]))(?=[\s"]*[=+\-@＝＋－＠]|[\t\r\n])""")


def safe_cell(text: str) -> str:
    """Keep a spreadsheet from running a cell of text, such as a file name, as a formula.

    Numbers are written as numbers and are not passed here, so negative ones are unchanged.

    Example:
        >>> safe_cell("=HYPERLINK(1).png")
        "'=HYPERLINK(1).png"
        >>> safe_cell("cat.png")
        'cat.png'
    """
    return _FORMULA.sub("'", text)


def write_csv(file: IO[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the columns' names and a line per row, with safe cells.

    Args:
        file: opened with unchanged line ends.
        columns: names of all values, in their order.
        rows: values by column; a missing one is empty.
    """
    table = csv.DictWriter(file, columns)
    table.writeheader()
    for row in rows:
        table.writerow(
            {
                name: safe_cell(value) if isinstance(value, str) else value
                for name, value in row.items()
            }
        )
