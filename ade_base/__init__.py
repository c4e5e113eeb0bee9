"""What every room may use: errors, files, pictures, ports. Imports nothing of ours."""
