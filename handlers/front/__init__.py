"""The HTTP front of every engine: connections, limits, access, and one shape of errors."""
