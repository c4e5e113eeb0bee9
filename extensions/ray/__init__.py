"""Serving and scoring on Ray."""
