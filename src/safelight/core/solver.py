"""Solvers of the diffusers package: which of them draw noise as they step."""

from __future__ import annotations

import functools
import inspect


@functools.cache
def takes_generator(solver_cls: type) -> bool:
    """Say whether a solver's `step` takes the source of its noise; without one it would draw from torch's own.

    Whether it draws at all is often a matter of its configuration (`stochastic_sampling`, `algorithm_type`).
    """
    return "generator" in inspect.signature(solver_cls.step).parameters  # type: ignore[attr-defined]
