"""The base of the errors that users see."""

from __future__ import annotations


class UserError(Exception):
    """An error whose text is shown to the user as it is, and no traceback.

    The text is one line that names what is wrong, what was expected and what came.
    """


class ConfigError(UserError, ValueError):
    """A model description that cannot be built."""
