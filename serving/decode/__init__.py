"""Image files that nobody vouches for: their structure is checked, then a process of its own
decodes them.
"""
