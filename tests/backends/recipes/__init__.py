"""Tiny random checkpoints of the diffusers package's pipelines, each from what its own constructor says."""
