"""Formats values and errors for messages to clients: short, and without memory addresses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unicodedata import category


def show(value: Any) -> str:
    """Format any value in at most 60 characters."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except RecursionError:  # lists that JSON could just nest
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def printable(text: str) -> str:
    """The text in UTF-8, which names of files need not be: other bytes become escapes."""
    return text.encode(errors="backslashreplace").decode()


def visible(text: str) -> str:
    """The text for a terminal or a log: characters that may control it, or end a line, are escapes.

    Example:
        >>> visible("\\x1b[2J.png")
        '\\\\x1b[2J.png'
    """
    return "".join(
        c if c.isprintable() or category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in text
    )


def counted(number: int, noun: str) -> str:
    """Write a number with its noun: ``1 image``, ``2 images``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def commonest(errors: Sequence[tuple[str, str]]) -> str:
    """The commonest reason among errors (name, reason), with the first name that has it."""
    ((reason, count),) = Counter(reason for _, reason in errors).most_common(1)
    first = next(name for name, why in errors if why == reason)
    return f"{first}: {reason}" + (f" (as for {counted(count - 1, 'other')})" if count > 1 else "")


def words_of(error: Exception) -> str:
    """Return a library's error message without memory addresses, which could help an attacker.

    An error without a message is named by its class.
    """
    return re.sub(r" at 0x[0-9a-f]+", "", str(error) or type(error).__name__)[:200]
