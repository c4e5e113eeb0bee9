"""The four verbs of the API, one module each."""
