"""Benchmarks that print ratios, so that they mean something on any machine."""
