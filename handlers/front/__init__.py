"""The HTTP front of every engine: connections, limits, who may come in, and errors of one shape."""
