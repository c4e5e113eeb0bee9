"""Cells of CSV files, which people open in spreadsheets."""

from __future__ import annotations

# What OWASP lists under "CSV injection"; the wide forms are what a Japanese or Chinese keyboard
# types.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def safe_cell(text: str) -> str:
    """Keep a spreadsheet from running a cell of text, such as a file name, as a formula.

    Numbers are written as numbers and do not come here: a negative one stays as it is.

    Example:
        >>> safe_cell("=HYPERLINK(1).png")
        "'=HYPERLINK(1).png"
        >>> safe_cell("cat.png")
        'cat.png'
    """
    # Some spreadsheets drop spaces before they look at the first character.
    return (
        f"'{text}"
        if text.startswith(FORMULA_STARTS) or text.lstrip().startswith(FORMULA_STARTS)
        else text
    )
