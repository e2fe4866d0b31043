"""What every pipeline of the diffusers package can be asked for, measured on tiny checkpoints: docs/pipelines.md."""
