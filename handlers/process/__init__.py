"""The engine of worker processes, without another model server."""
