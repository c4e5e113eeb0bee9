"""Several systems under one budget, measured alike, in one report."""
