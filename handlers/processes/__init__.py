"""Supervision of the processes of a service."""
