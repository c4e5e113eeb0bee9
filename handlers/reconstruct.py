"""TorchServe's entry point for ``reconstruct``. It wants exactly one class in this file."""

from handlers import base


class ReconstructHandler(base.OperationHandler):
    """See :class:`handlers.base.OperationHandler`."""

    operation = "reconstruct"
