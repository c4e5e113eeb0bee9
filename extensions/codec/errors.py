"""The errors of this package."""

from __future__ import annotations

from ade_base.errors import UserError


class CodingError(UserError, ValueError):
    """An archive cannot be written or read as requested; the message is for the user."""


class NotDecoded(CodingError):
    """This machine cannot decode an image now; that is no damage of the archive."""


class TooLarge(NotDecoded):
    """An image takes more time or memory to decode than is allowed, and probably always here."""


class NotCoded(ValueError):
    """The model cannot code this image, whose numbers leave the range of the coder."""


class Damaged(ValueError):
    """The content of a chunk is not what any encoder writes."""
