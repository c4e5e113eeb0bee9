"""Figures that depend on the machine; no test asserts them."""
