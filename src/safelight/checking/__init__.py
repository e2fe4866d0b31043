"""Comparison of a loaded model with Diffusers, tensor by tensor: what a porter runs all day."""
