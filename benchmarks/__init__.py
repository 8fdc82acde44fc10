"""Benchmarks against other libraries. Run `python -m benchmarks.recurrence` from the root of the repository."""
