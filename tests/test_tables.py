"""No cell of a table is run by a spreadsheet."""

import csv
import io

import pytest

from ade_base.tables import FORMULA_STARTS, safe_cell, write_csv


@pytest.mark.parametrize(
    "name", ["=1+1.png", "+1", "-1", "@SUM(A1)", "\t1", "\r1", "\n1", " =1", "＝1"]
)
def test_spreadsheets_run_no_cell(name):
    assert safe_cell(name) == f"'{name}"
    table = io.StringIO(newline="")
    write_csv(table, ["path", "bpd", "notes"], [{"path": name, "bpd": -1.25, "notes": "=note"}])
    (row,) = csv.DictReader(io.StringIO(table.getvalue(), newline=""))
    assert row == {"path": f"'{name}", "bpd": "-1.25", "notes": "'=note"}, "numbers stay numbers"


@pytest.mark.parametrize("separator", [";", "; ", "\t", "\n", "\r", ';"', ";\t", ";;"])
def test_spreadsheets_that_split_elsewhere_run_no_cell(separator):
    name = f"a{separator}=cmd|'/C calc'!A1;.png"
    table = io.StringIO(newline="")
    write_csv(table, ["path", "notes"], [{"path": name, "notes": f"{name}, as before"}])
    for delimiter in (",", ";", "\t"):
        rows = csv.reader(io.StringIO(table.getvalue(), newline=""), delimiter=delimiter)
        cells = [cell.lstrip(" ") for row in rows for cell in row]
        assert not [cell for cell in cells if cell.startswith(tuple(FORMULA_STARTS))]


@pytest.mark.parametrize(
    "name", ["cat.png", "", "a=1", "folder/-1.png", "'quoted", "a; b", "a;b=1"]
)
def test_other_cells_stay_as_they_are(name):
    assert safe_cell(name) == name
