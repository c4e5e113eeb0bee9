"""TorchServe's entry point for ``sample``. TorchServe allows only one class here."""

from handlers.torchserve import base


class SampleHandler(base.OperationHandler):
    """See :class:`handlers.torchserve.base.OperationHandler`."""

    operation = "sample"
