"""Cells of CSV files that are safe to open in a spreadsheet."""

from __future__ import annotations

# From OWASP's page on CSV injection; Japanese and Chinese keyboards type the full-width forms.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def safe_cell(text: str) -> str:
    """Keep a spreadsheet from running a cell of text, such as a file name, as a formula.

    Numbers are written as numbers and are not passed here, so negative ones are unchanged.

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
