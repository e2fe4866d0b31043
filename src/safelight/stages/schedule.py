"""Schedules that flow-matching models share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def linear_sigmas(num_steps: int) -> list[float]:
    """Return evenly spaced noise levels from 1 to 1/steps."""
    spaced: list[float] = np.linspace(1.0, 1 / num_steps, num_steps).tolist()
    return spaced


def check_takes_sigmas(component_configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a solver to which a flow-matching pipeline's noise levels cannot be given.

    Args:
        component_configs: the components' JSON, `model_index` among them.

    Raises:
        ValueError: if it spaces its steps for another kind of noise.

    """
    class_name = component_configs["model_index"]["scheduler"][1]
    if not class_name.startswith("FlowMatch") and not component_configs["scheduler"].get("use_flow_sigmas"):
        raise ValueError(f"scheduler: use_flow_sigmas: this pipeline needs it to be true of {class_name}")


def linear_mu(num_tokens: int, scheduler_config: Mapping[str, Any]) -> float:
    """Return the dynamic shift for this many image tokens, on the line through the scheduler's two points."""
    base_length = scheduler_config.get("base_image_seq_len", 256)
    max_length = scheduler_config.get("max_image_seq_len", 4096)
    base_shift = scheduler_config.get("base_shift", 0.5)
    slope = (scheduler_config.get("max_shift", 1.15) - base_shift) / (max_length - base_length)
    shift: float = num_tokens * slope + (base_shift - slope * base_length)
    return shift


def shifted_sigmas(timesteps: Sequence[float], shift: float, num_train_timesteps: int) -> list[float]:
    """Return, for each timestep, the nearest noise level of a training schedule with a flow shift."""
    levels = np.linspace(1, num_train_timesteps, num_train_timesteps, dtype=np.float32) / num_train_timesteps
    sigmas = shift * levels / (1 + (shift - 1) * levels)
    distances = np.abs(sigmas[None] * num_train_timesteps - np.asarray(timesteps, dtype=np.float32)[:, None])
    nearest: list[float] = sigmas[distances.argmin(axis=1)].tolist()
    return nearest
