"""Pipelines without a family of ours, run by the packages that have them."""
