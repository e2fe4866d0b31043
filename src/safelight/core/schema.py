"""What the API and the command line must know of a loaded model, without torch and without weights."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from safelight.core.architecture import Architecture
from safelight.core.options import Option
from safelight.core.params import SamplingParams
from safelight.core.stage_memory import StageMemory


class ModelTaskType(enum.StrEnum):
    """What goes in and what comes out: T text, I image, V video, A sound."""

    T2I = "T2I"
    I2I = "I2I"
    TI2I = "TI2I"
    T2V = "T2V"
    I2V = "I2V"
    TI2V = "TI2V"
    V2I = "V2I"
    TV2I = "TV2I"
    V2V = "V2V"
    TV2V = "TV2V"
    T2A = "T2A"

    @property
    def makes_video(self) -> bool:
        """Whether outputs are videos, and not pictures."""
        return self.endswith("V")

    @property
    def lasts(self) -> bool:
        """Whether outputs are heard or seen for a while: videos and sounds, which are asked for by the same route."""
        return self.endswith(("V", "A"))


@dataclass(frozen=True)
class ModelSchema:
    """What one model takes: from this alone every bad value is refused.

    Attributes:
        model: the name or path that the model was asked for by.
        pipeline_name: `_class_name` of its `model_index.json`.
        task: what goes in and what comes out.
        params_cls: the family's sampling parameters.
        defaults: what unset fields take: the family's values, with the loaded model's own over them.
        size_multiple: heights and widths must be multiples of it, in pixels.
        num_input_images: the least and the most input images.
        frame_step: frame counts are one more than a multiple of it.
        notes: what every user of this model should know; with each result.
        capabilities: names of what the components allow, as the family's parameters understand them.
        solvers: names of the solvers that it runs with beside its own, each with those of the fields `sigmas` and
            `timesteps` that may be given with it.
        task_solvers: the same for the pipelines of its other tasks, by their names.
        architecture: of the network that runs at every step; None where it is not known.
        token_bytes: that a step holds for each token, at the very least; 0 where that is not known.
        device_bytes: that all devices of a request have beside the weights; 0 where that is not known.
        stage_memory: what each stage takes, as it was counted; nothing where it was not.

    """

    model: str
    pipeline_name: str
    task: ModelTaskType
    params_cls: type[SamplingParams]
    defaults: Mapping[str, Any]
    size_multiple: int
    num_input_images: tuple[int, int] = (0, 0)
    frame_step: int = 1
    notes: tuple[str, ...] = ()
    capabilities: frozenset[str] = field(default_factory=frozenset)
    solvers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    task_solvers: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    architecture: Architecture | None = None
    token_bytes: int = 0
    device_bytes: int = 0
    stage_memory: tuple[StageMemory, ...] = ()

    def pipeline_for(self, given: Collection[str]) -> str:
        """Return the pipeline that makes a request with these fields."""
        task = self.params_cls.task_of(given)
        return self.pipeline_name if task is None else task.pipeline_name

    def defaults_for(self, given: Collection[str]) -> Mapping[str, Any]:
        """Return what unset fields take in a request with these."""
        task = self.params_cls.task_of(given)
        return self.defaults if task is None or task.pipeline_name == self.pipeline_name else task.defaults

    def options(self) -> dict[str, Option]:
        """Return the fields that this model takes, in order, by name; its own solvers among them."""
        options = self.params_cls.options()
        names = tuple(dict.fromkeys(name for taken in (self.solvers, *self.task_solvers.values()) for name in taken))
        if names and "scheduler" in options:
            return {**options, "scheduler": replace(options["scheduler"], choices=names)}
        return {name: option for name, option in options.items() if name != "scheduler"}

    def solvers_for(self, given: Collection[str]) -> Mapping[str, tuple[str, ...]]:
        """Return the solvers that a request with these fields may name, as `solvers`."""
        return self.task_solvers.get(self.pipeline_for(given), self.solvers)

    def json_schema(self) -> dict[str, Any]:
        """Return a JSON Schema (2020-12) of what may be asked, with defaults, ranges and a group for forms."""
        properties: dict[str, Any] = {}
        for name, option in self.options().items():
            entry = option.json_schema()
            if name in ("height", "width") and not self.params_cls.fits_size:
                entry["multipleOf"] = self.size_multiple
            if option.kind == "images":
                entry["minItems"], entry["maxItems"] = self.num_input_images
            if name in self.defaults:
                entry["default"] = self.defaults[name]
            properties[name] = entry
        needed = (*("prompt",) * self.params_cls.needs_prompt, *("image",) * (self.num_input_images[0] > 0))
        required = [name for name in needed if name in properties]
        tasks = self.params_cls.tasks_schema()
        for task in tasks.get("x-pipelines", ()):
            task["schedulers"] = [*self.task_solvers.get(task["pipeline"], self.solvers)]
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": self.pipeline_name,
            "description": f"Parameters of {self.model} ({self.task})",
            "type": "object",
            "properties": properties,
            "required": [name for name in required if name not in self.defaults],
            "additionalProperties": False,
            **tasks,
        }
