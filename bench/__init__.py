"""Benchmarks; imported as `sparse_attn.bench`."""
