"""Bodies of requests to parameters and images."""
