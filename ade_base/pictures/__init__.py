"""Decodes untrusted image files: checks their structure, then decodes them in another process."""
