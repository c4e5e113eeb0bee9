"""TorchServe's entry point. TorchServe copies this file, and allows only one class in it."""

from handlers.torchserve import base


class Handler(base.OperationHandler):
    """See :class:`handlers.torchserve.base.OperationHandler`."""
