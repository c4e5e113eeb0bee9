"""Errors that a caller of the model can act on."""


class ShapeError(ValueError):
    """A tensor does not have the shape that the operation needs."""


class ConfigError(ValueError):
    """A model description that cannot be built."""
