"""Layers that families share, with the parameter names of the Diffusers checkpoints."""
