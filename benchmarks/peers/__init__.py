"""The same graph, engine and answers behind other servers: what `benchmarks.serving` compares with.

Each is a program.
"""
