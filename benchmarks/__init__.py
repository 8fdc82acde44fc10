"""Measurements side by side: `python -m benchmarks.recurrence`, from the root of the repository."""
