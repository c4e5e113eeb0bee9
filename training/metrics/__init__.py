"""How good are the samples? One metric a file, each on generated against held-out images."""
