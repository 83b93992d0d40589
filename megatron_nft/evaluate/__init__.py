"""Evaluations: protocol, benchmarks, statistics, the runner and the comparison of two results."""
