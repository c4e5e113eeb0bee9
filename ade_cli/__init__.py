"""The command-line program ``ade``: one file a verb, each parses, calls and prints."""
