"""A gate before the upload forms of an ASGI application.

The application imports :class:`extensions.upload_gate.middleware.GateMiddleware`; ``ade`` gets
nothing from it.
"""

from ade_base.extensions import Extension

EXTENSION = Extension()
