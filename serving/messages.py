"""Values and errors as they may appear in messages to a client: short, and without what helps an
attacker.
"""

from __future__ import annotations

import re
from typing import Any


def show(value: Any) -> str:
    """A value for a message, short whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def words_of(error: Exception) -> str:
    """What a library says of its input, without the addresses of its objects: they help whoever
    attacks a decoder.
    """
    return re.sub(r" at 0x[0-9a-f]+", "", str(error))[:200]
