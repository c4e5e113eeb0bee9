"""TorchServe's entry point. TorchServe copies this file, and allows only one class in it."""

from handlers.torchserve import handler


class Handler(handler.OperationHandler):
    """See :class:`handlers.torchserve.handler.OperationHandler`."""
