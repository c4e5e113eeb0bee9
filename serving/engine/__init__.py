"""Runs a bundle's graphs: NumPy arrays in, NumPy arrays out."""
