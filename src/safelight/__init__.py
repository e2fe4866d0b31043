"""Safelight: an inference and serving engine for diffusion models.

`DiffusionGenerator` is the way in. Names are imported when they are first used, so that `import safelight`, and
whatever needs no model, does without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from safelight.version import __version__

if TYPE_CHECKING:
    from safelight.core.params import SamplingParams
    from safelight.core.registry import register_configs
    from safelight.core.server_args import ServerArgs
    from safelight.errors import SafelightError
    from safelight.generator import DiffusionGenerator
    from safelight.results import GenerationEvent, GenerationOutput, GenerationResult

_EXPORTS = {
    "DiffusionGenerator": "safelight.generator",
    "GenerationEvent": "safelight.results",
    "GenerationOutput": "safelight.results",
    "GenerationResult": "safelight.results",
    "SafelightError": "safelight.errors",
    "SamplingParams": "safelight.core.params",
    "ServerArgs": "safelight.core.server_args",
    "register_configs": "safelight.core.registry",
}

__all__ = [
    "DiffusionGenerator",
    "GenerationEvent",
    "GenerationOutput",
    "GenerationResult",
    "SafelightError",
    "SamplingParams",
    "ServerArgs",
    "__version__",
    "register_configs",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
