"""Benchmarks, whose figures depend on the machine; no test asserts them."""
