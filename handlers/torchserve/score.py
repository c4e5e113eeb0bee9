"""TorchServe's entry point for ``score``. TorchServe allows only one class here."""

from handlers.torchserve import base


class ScoreHandler(base.OperationHandler):
    """See :class:`handlers.torchserve.base.OperationHandler`."""

    operation = "score"
