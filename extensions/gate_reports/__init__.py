"""Reports about a gate."""
