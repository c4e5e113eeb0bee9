"""A file per verb: parses, calls and prints."""
