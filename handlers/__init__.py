"""Engines of the service, a folder each, and what they share: ``front`` and ``launch``."""
