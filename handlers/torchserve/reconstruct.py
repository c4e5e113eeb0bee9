"""TorchServe's entry point for ``reconstruct``. It wants exactly one class in this file."""

from handlers.torchserve import base


class ReconstructHandler(base.OperationHandler):
    """See :class:`handlers.torchserve.base.OperationHandler`."""

    operation = "reconstruct"
