"""TorchServe's entry point for ``encode``. It wants exactly one class in this file."""

from handlers import base


class EncodeHandler(base.OperationHandler):
    """See :class:`handlers.base.OperationHandler`."""

    operation = "encode"
