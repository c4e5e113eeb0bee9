"""TorchServe's entry point for ``sample``. It wants exactly one class in this file."""

from handlers import base


class SampleHandler(base.OperationHandler):
    """See :class:`handlers.base.OperationHandler`."""

    operation = "sample"
