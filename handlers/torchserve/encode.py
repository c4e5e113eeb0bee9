"""TorchServe's entry point for ``encode``. TorchServe allows only one class here."""

from handlers.torchserve import base


class EncodeHandler(base.OperationHandler):
    """See :class:`handlers.torchserve.base.OperationHandler`."""

    operation = "encode"
