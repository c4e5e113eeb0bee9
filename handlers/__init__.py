"""Adapters for model servers, one folder per server."""
