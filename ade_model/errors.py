"""The error of a wrong call of the model. Descriptions of models raise ConfigError instead."""


class ShapeError(ValueError):
    """A tensor does not have the shape that the operation needs."""
