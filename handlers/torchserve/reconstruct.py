"""TorchServe's entry point for ``reconstruct``. TorchServe allows only one class here."""

from handlers.torchserve import base


class ReconstructHandler(base.OperationHandler):
    """See :class:`handlers.torchserve.base.OperationHandler`."""

    operation = "reconstruct"
