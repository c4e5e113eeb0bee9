"""Lines of code: what is too long is on a list that may only shrink. See tests/house.py."""

from __future__ import annotations

import ast
import textwrap

import pytest

from tests.house import MAX_FILE, MAX_FUNCTION, RECORD, code_lines, read_record, sizes

AGAIN = "python -m tests.house --record"


@pytest.fixture(scope="module")
def found():
    return sizes()


@pytest.mark.parametrize("kind", ["files", "functions"])
def test_nothing_else_is_too_long_and_nothing_grows(found, kind):
    listed: dict[str, int] = read_record()[kind]
    most = {"files": MAX_FILE, "functions": MAX_FUNCTION}[kind]
    too_long = {
        name: f"{lines} lines of code, at most {listed.get(name, most)}"
        for name, lines in found[kind].items()
        if lines > listed.get(name, most)
    }
    assert not too_long, f"{too_long}: if it only moved, {AGAIN}"
    gone = sorted(listed.keys() - found[kind].keys())
    assert not gone, f"{gone} in {RECORD.name}: no longer too long, or moved: {AGAIN}"


@pytest.mark.parametrize("part", ["product", "core", "tests"])
def test_the_whole_does_not_grow(found, part):
    assert found["lines"][part] <= read_record()["lines"][part]


def test_what_is_counted():
    text = textwrap.dedent(
        '''\
        """Of a module,
        two lines."""
        # a comment

        def f(  # counted
            a,
        ) -> str:
            """Not counted."""
            return """counted

            counted, but not the line above"""
        '''
    )
    assert sorted(code_lines(text, ast.parse(text))) == [5, 6, 7, 9, 11]
