"""Names of files in an archive."""

from __future__ import annotations

MAX_PARTS = 64  # folders and file; what makes or removes folders recurses


def is_safe(name: str) -> bool:
    """Whether a file of this name is within its folder, on any system."""
    parts = name.split("/")
    return (
        not {"", ".", ".."}.intersection(parts)
        and not {"\0", "\\"}.intersection(name)  # others take a backslash for a folder
        and len(name) <= 4096
        and len(parts) <= MAX_PARTS
    )
