"""What both training scripts share: resumable runs, the learning rate, averaged weights."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import nn

SECONDS_BETWEEN_CHECKPOINTS = 120


class Trainee:
    """Modules, their averaged copy, the optimizers and the step count: all that a resume needs."""

    def __init__(self, modules: nn.ModuleDict, optimizers: list[torch.optim.Optimizer], average_decay: float) -> None:
        self.modules = modules
        self.optimizers = optimizers
        self.base_learning_rates = [
            [float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers
        ]
        self.average_decay = average_decay
        self.average = {name: value.clone() for name, value in modules.state_dict().items()}
        self.step = 0

    def advance(self, learning_rate_factor: float, max_gradient_norm: float) -> float:
        """One optimizer step on the accumulated gradients; returns their norm."""
        norm = nn.utils.clip_grad_norm_(self.modules.parameters(), max_gradient_norm)
        for optimizer, rates in zip(self.optimizers, self.base_learning_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate_factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # A short run starts from noise: average over at most a tenth of the steps so far.
        decay = min(self.average_decay, 1 - 10 / (10 + self.step))
        with torch.no_grad():
            for name, value in self.modules.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - decay)
        return float(norm)

    def save(self, path: Path) -> None:
        """Write everything; a reader sees the old file or the new one, never half."""
        state = {
            "step": self.step,
            "modules": self.modules.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def resume(self, path: Path) -> None:
        """Continue from `path` where it exists."""
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.modules.load_state_dict(state["modules"])
        self.average = state["average"]
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)


def steps_until_stopped(trainee: Trainee, num_steps: int, path: Path) -> Iterator[int]:
    """Step numbers from where `trainee` stands; saves every few minutes, at the end, on SIGTERM."""
    stopped = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    saved_at = time.monotonic()
    while trainee.step < num_steps and not stopped:
        yield trainee.step
        if time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
            trainee.save(path)
            saved_at = time.monotonic()
    trainee.save(path)


def learning_rate_factor(step: int, num_warmup_steps: int, num_steps: int) -> float:
    """Linear warmup, then a cosine to one hundredth."""
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
