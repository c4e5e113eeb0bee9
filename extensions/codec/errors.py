"""The errors of this package."""

from __future__ import annotations

from ade_base.errors import UserError


class CodingError(UserError, ValueError):
    """An archive cannot be written or read as requested; the message is for the user."""


class NotCoded(ValueError):
    """The model cannot code this image, whose numbers leave the range of the coder."""


class Damaged(ValueError):
    """The images of a chunk do not come back; the message says why."""
