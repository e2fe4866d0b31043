"""Benchmarks: each compares with Diffusers on the same weights. Run one as `python -m benchmarks.NAME`."""
