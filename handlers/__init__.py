"""Adapters of model servers, a folder each. They translate, and nothing more."""
