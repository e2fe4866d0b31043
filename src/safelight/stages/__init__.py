"""The standard stages, one a file. They know no family: a model's conventions are callbacks of its configuration."""
