"""Code shared by tests and benchmarks: pytest plugins, an HLO parser, and intentionally wrong rules."""
