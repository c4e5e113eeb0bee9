"""TorchServe's entry point for ``encode``. It wants exactly one class in this file."""

from handlers.torchserve import base


class EncodeHandler(base.OperationHandler):
    """See :class:`handlers.torchserve.base.OperationHandler`."""

    operation = "encode"
