"""A gate before the upload forms of an ASGI application."""
