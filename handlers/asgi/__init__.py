"""The service without a model server: an ASGI application before worker processes of its own."""
