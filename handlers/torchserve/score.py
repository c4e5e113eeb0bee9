"""TorchServe's entry point for ``score``. It wants exactly one class in this file."""

from handlers.torchserve import base


class ScoreHandler(base.OperationHandler):
    """See :class:`handlers.torchserve.base.OperationHandler`."""

    operation = "score"
