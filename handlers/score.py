"""TorchServe's entry point for ``score``. It wants exactly one class in this file."""

from handlers import base


class ScoreHandler(base.OperationHandler):
    """See :class:`handlers.base.OperationHandler`."""

    operation = "score"
