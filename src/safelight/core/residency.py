"""Which of a pipeline's components lie on the device. Of alternates, of which a step needs one, the others may wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Residency:
    """Brings the component that a call names to the device, and lets its alternates wait on the host.

    Their weights keep their place on the host (a mapped file, where they were loaded from one), so that leaving the
    device copies nothing.

    Args:
        modules: the pipeline's components, by name; alternates lie on the host.
        alternates: names of those of which one at a time is on the device; empty keeps all where they are.
        device: where components run.

    """

    def __init__(self, modules: Mapping[str, Any], alternates: Sequence[str], device: torch.device) -> None:
        self._modules = modules
        self._device = device
        self._hosted: dict[str, dict[str, Tensor]] = {name: modules[name].state_dict() for name in alternates}
        self._current: str | None = None
        self.num_swaps = 0

    def is_resident(self, name: str) -> bool:
        """Say whether a component can run at once."""
        return name not in self._hosted or name == self._current

    def component(self, name: str) -> Any:
        """Return a component, on the device."""
        if not self.is_resident(name):
            self._swap_in(name)
        return self._modules[name]

    def _swap_in(self, name: str) -> None:
        if self._current is not None:
            self._modules[self._current].load_state_dict(self._hosted[self._current], assign=True)
        self._current = name
        with torch.inference_mode(False):  # weights are ordinary tensors, whoever drives
            on_device = {key: tensor.to(self._device) for key, tensor in self._hosted[name].items()}
        self._modules[name].load_state_dict(on_device, assign=True)
        self.num_swaps += 1
