"""What the components of one pipeline do by the package's other pipelines: its own tables say which belong together."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from safelight.backends.components import needed_components
from safelight.backends.signature import params_from_signature
from safelight.core.options import Option
from safelight.core.package_params import PackageParams, make_params_cls
from safelight.core.params import SamplingParams
from safelight.core.tasks import MASK, MASK_IMAGE, Task
from safelight.errors import ModelIndexError

TABLES = (
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING",
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
    "AUTO_INPAINT_PIPELINES_MAPPING",
    "AUTO_TEXT2VIDEO_PIPELINES_MAPPING",
    "AUTO_IMAGE2VIDEO_PIPELINES_MAPPING",
    "AUTO_VIDEO2VIDEO_PIPELINES_MAPPING",
)
"""The package's: each has for a model's name the pipeline of one task."""
NEEDED = ("image", MASK_IMAGE, "control_image", "video")
"""Inputs without which a pipeline of a task cannot do, whatever its signature has for a default."""
MASK_OPTION = Option("image", "a picture of the size of image, which is made anew where this one is transparent")


def params_of(class_name: str, components: Collection[str]) -> type[PackageParams]:
    """Return what may be asked of a model: of the pipeline that its index names, and of those by other tables.

    Args:
        class_name: of a pipeline of the package.
        components: names of those that the model has.

    Raises:
        ModelIndexError: if the pipeline cannot be run here.

    """
    made = [params_from_signature(cls.__call__, cls.__name__) for cls in (_pipeline(class_name),)]
    for cls in related(class_name):
        if needed_components(cls.__name__) <= {*components}:
            try:
                made.append(params_from_signature(cls.__call__, cls.__name__))
            except ModelIndexError:  # it cannot be run here, whatever table has it
                continue
    tasks = [each.tasks[0] for each in made]
    tasks = [tasks[0], *(_needing(task) for task in tasks[1:])]
    return _union(made, tuple(map(_with_mask, tasks)))


def related(class_name: str) -> Iterator[Any]:
    """Yield the other pipelines of the model that a pipeline is of, as the package's tables have them."""
    from diffusers.pipelines import auto_pipeline

    tables: list[Mapping[str, Any]] = [vars(auto_pipeline)[name] for name in TABLES]
    models = {model for table in tables for model, cls in table.items() if cls.__name__ == class_name}
    found = {table[model].__name__: table[model] for table in tables for model in sorted(models) if model in table}
    yield from (cls for name, cls in found.items() if name != class_name)


def over_the_same(pipe: Any, class_name: str) -> Any:
    """Return a pipeline of another class over a pipeline's components, and with its settings.

    The package's own `from_pipe` converts the components, which are the first one's too.
    """
    cls = _pipeline(class_name)
    held = {**pipe.config, **pipe.components}
    taken = {name: held[name] for name in inspect.signature(cls.__init__).parameters if name in held}
    made = cls(**taken)
    made.set_progress_bar_config(disable=True)
    return made


def _pipeline(class_name: str) -> Any:
    import diffusers

    return getattr(diffusers, class_name)


def _needing(task: Task) -> Task:
    needs = {*task.needs, *(name for name in NEEDED if name in task.inputs)}
    return dataclasses.replace(task, needs=tuple(sorted(needs)))


def _with_mask(task: Task) -> Task:
    return dataclasses.replace(task, fields=(*task.fields, MASK)) if MASK_IMAGE in task.inputs else task


def _union(made: list[type[PackageParams]], tasks: tuple[Task, ...]) -> type[PackageParams]:
    """Return a class with every field of several; where two have one, it is the first's."""
    options: dict[str, Option] = functools.reduce(lambda found, cls: {**cls.options(), **found}, made, {})
    if any(MASK_IMAGE in task.inputs for task in tasks):
        options[MASK] = MASK_OPTION
    for name, known in options.items():
        having = [task.pipeline_name for task in tasks if name in task.fields]
        if len(having) < len(tasks):
            options[name] = dataclasses.replace(known, help=f"{known.help} ({', '.join(having)})")
    common = SamplingParams.options()
    return make_params_cls(
        made[0].__name__,
        {name: known for name, known in options.items() if common.get(name) != known},
        defaults=made[0].defaults,
        excluded=frozenset(common.keys() - options.keys()),
        refused={name: why for cls in reversed(made) for name, why in cls.refused.items() if name not in options},
        tasks=tasks,
    )
