"""Measurements side by side: `python -m benchmarks.lstm`, from the root of the repository."""
