"""Durable jobs: what a job is, where it is kept, who runs it, what is told of it, and how long it stays. No torch."""
