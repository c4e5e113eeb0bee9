"""What makes an image out-of-distribution, and how sure the verdict is."""
