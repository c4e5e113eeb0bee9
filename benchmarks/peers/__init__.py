"""Other servers with the same graph, engine and answers, for `benchmarks.serving`.

Each module is a program.
"""
