"""The benchmarks that asv runs, and the gate: see docs/benchmarking.md."""
