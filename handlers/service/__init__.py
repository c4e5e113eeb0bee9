"""The service without a model server: an ASGI application with its own worker processes."""
