"""Measurements, each one command: python -m bench.overhead, bench.startup, bench.strategies. Results: bench/results/*.json."""
