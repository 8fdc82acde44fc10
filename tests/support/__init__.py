"""Code shared by tests and benchmarks: a reader of compiled programs, and rules that are wrong on purpose."""
