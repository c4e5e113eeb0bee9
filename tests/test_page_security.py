"""The page under attack: what is refused, and that it still answers afterwards."""

from __future__ import annotations

import csv
import io

import pytest

from serving.page.many import _csv
from serving.tables import safe_cell


@pytest.mark.parametrize("name", ["=1+1.png", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "＝1"])
def test_spreadsheets_run_no_cell(name: str) -> None:
    assert safe_cell(name) == f"'{name}"
    rows = list(csv.reader(io.StringIO(_csv([[name, -1.25, 0.5, "usual", "=note"]]).decode(), newline="")))
    assert rows[1] == [f"'{name}", "-1.25", "0.5", "usual", "'=note"], "numbers stay numbers"


@pytest.mark.parametrize("name", ["cat.png", "", "a=1", "folder/-1.png", "'quoted"])
def test_other_cells_stay_as_they_are(name: str) -> None:
    assert safe_cell(name) == name
