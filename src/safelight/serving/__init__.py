"""The HTTP API: one process that imports no torch."""
