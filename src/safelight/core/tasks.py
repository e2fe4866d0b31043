"""Several tasks of one loaded model: the parameters of its pipelines in one class. Imports no torch.

An index names one pipeline, and the same components do more: with a picture in the request they edit it, with a mask a
part of it. Each of these pipelines is a `Task`; a request's own inputs select one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from safelight.core.params import SamplingParams
from safelight.errors import InvalidParameterError

if TYPE_CHECKING:
    from safelight.core.schema import ModelSchema

MASK, MASK_IMAGE = "mask", "mask_image"
"""A mask as OpenAI's API has it, transparent where the picture is made anew, and as the package does: white there."""


@dataclass(frozen=True)
class Task:
    """What a loaded model does by one pipeline.

    Attributes:
        pipeline_name: of the pipeline.
        inputs: the fields of it that hold pictures and clips; those that a request has select it.
        needs: the fields that it cannot do without.
        fields: all that it takes.
        defaults: what its unset fields take.

    """

    pipeline_name: str
    inputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


class TaskParams(SamplingParams):
    """Parameters of a model of which a request's pictures select the pipeline."""

    tasks: ClassVar[tuple[Task, ...]] = ()
    """What the model does, the pipeline of its index first; they share all fields that have one name."""

    @classmethod
    def task_of(cls, given: Collection[str]) -> Task | None:
        """Return the task that the given fields select: of those that take all the pictures, the one that takes least.

        Of equal ones it is the first. Where none takes them all, it is the one that takes most of them.
        """
        names = set(given)
        if MASK in names:
            names.add(MASK_IMAGE)
        inputs = names & {name for task in cls.tasks for name in task.inputs}
        return min(cls.tasks, key=lambda task: (len(inputs - {*task.inputs}), len(task.inputs)), default=None)

    @classmethod
    def tasks_schema(cls) -> dict[str, Any]:
        """Return which inputs select which pipeline, what it cannot do without, and its fields and defaults."""
        if len(cls.tasks) < 2:
            return {}
        return {
            "x-pipelines": [
                {
                    "pipeline": task.pipeline_name,
                    "selectedBy": list(task.inputs),
                    "required": list(task.needs),
                    "fields": list(task.fields),
                    "defaults": dict(task.defaults),
                }
                for task in cls.tasks
            ]
        }

    @classmethod
    def converts_mask(cls) -> bool:
        """Say whether `mask` is another form of `mask_image`, and not a pipeline's own field of that name."""
        return {MASK, MASK_IMAGE} <= cls.options().keys()

    @classmethod
    def needs_alpha(cls, name: str) -> bool:
        """Say whether a field's picture says by its transparency what it says."""
        return name == MASK and cls.converts_mask()

    def validate(self, schema: ModelSchema, given: Mapping[str, Any]) -> None:
        """Check what is set against the task that it selects."""
        task = self.task_of(given)
        if task is not None:
            self._check_task(task, given)
        super().validate(schema, given)
        mask = vars(self)[MASK] if self.converts_mask() else None
        images = self.given_images()
        if mask is not None and images and mask.size != images[0].size:
            size = f"{images[0].width}x{images[0].height}"
            raise InvalidParameterError(MASK, f"{mask.width}x{mask.height}", f"a picture of the size of image, {size}")

    def _check_task(self, task: Task, given: Mapping[str, Any]) -> None:
        by = [name for name in (*task.inputs, MASK) if name in given]
        selected = f"{task.pipeline_name}, which {' and '.join(by) or 'no picture'} selects"
        if {MASK, MASK_IMAGE} <= given.keys():
            raise InvalidParameterError(MASK, "a picture", f"nothing, where {MASK_IMAGE} is given")
        for name in sorted(given.keys() - {*task.fields}):
            others = [each for each in self.tasks if name in each.fields]
            takes = " or ".join(f"{' and '.join(each.inputs) or 'no picture'}" for each in others)
            value = "a picture" if name in {*task.inputs, MASK} else given[name]
            raise InvalidParameterError(name, value, f"nothing for {selected}; it goes with {takes}")
        for name in task.needs:
            if vars(self)[name] is None and not (name == MASK_IMAGE and MASK in given):
                raise InvalidParameterError(name, None, f"{self.options()[name].takes()}, for {selected}")
