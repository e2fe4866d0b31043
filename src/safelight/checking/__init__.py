"""Comparison of a loaded model with Diffusers, tensor by tensor: what a porter runs all day."""

from safelight.checking.check import check_model, compare
from safelight.checking.report import Report, Row

__all__ = ["Report", "Row", "check_model", "compare"]
