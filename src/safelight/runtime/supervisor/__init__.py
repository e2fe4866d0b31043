"""What watches workers: supervisors, replicas, and an engine of several ranks for the Python API."""
