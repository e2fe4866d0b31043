"""Many devices for one request: what a model states as data is applied to it here, from outside."""
