"""The command-line program ``ade``; each verb's module parses, calls and prints."""
