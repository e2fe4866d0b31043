"""Parameters of pipelines that have no family here: made from what their own calls take. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Self

from PIL import Image

from safelight.core.options import MEDIA_KINDS, Option
from safelight.core.tasks import Task, TaskParams

if TYPE_CHECKING:
    from safelight.core.schema import ModelSchema

UNSTATED_SIDE, TOKEN_SIDE, FRAMES_OF_A_TOKEN = 1024, 16, 8
"""Pixels of a side that the call leaves to the model, and of a latent token's, and its frames: for the estimate of a
request's cost."""
LONG_TEXT = " ".join(["a"] * 1024)
"""As long as any call takes it: it is cut to the length that the call takes."""
EXAMPLES: Mapping[str, Any] = {
    **dict.fromkeys(("string", "strings", "text or texts"), "a"),
    **dict.fromkeys(("integer", "integer or integers"), 1),
    **dict.fromkeys(("number", "number or numbers"), 1.0),
    **dict.fromkeys(("boolean", "boolean or booleans"), True),
    "numbers": [1.0],
    "integers": [1],
    "texts": ["a"],
    "object": {},
    "objects": [{}],
}
"""By kind, a value that most calls take."""
NUM_FRAMES = 9
"""Of a clip that stands for another."""
FRAME_RATE = "frame_rate"
"""What some pipelines call the frames a second that they are told."""


class PackageParams(TaskParams):
    """Parameters of a pipeline of the package, whose model alone knows its own size and multiples."""

    def resolve(self, schema: ModelSchema) -> Self:
        """Return a copy that is checked and has the model's defaults; a rate that the call is told is the file's too.

        Raises:
            InvalidParameterError: naming the field, what it got and what it takes.

        """
        resolved = super().resolve(schema)
        told = vars(resolved).get(FRAME_RATE)
        if self.fps is None and isinstance(told, int | float) and "fps" in self.options():
            return dataclasses.replace(resolved, fps=max(1, round(told)))
        return resolved

    @classmethod
    def example_fields(cls, height: int, width: int) -> dict[str, Any]:
        """Return what the call cannot do without, and a text: a long one where it is cut to a length."""
        options = cls.options()
        blank = Image.new("RGB", (width, height), (128, 128, 128))
        examples = {**EXAMPLES, **dict.fromkeys(MEDIA_KINDS, blank), "clip": (blank,) * NUM_FRAMES}
        needs = cls.tasks[0].needs if cls.tasks else ()
        given = {name: examples[options[name].kind] for name in needs if name in options}
        text = LONG_TEXT if any("sequence_length" in name for name in options) else "a"
        return {**given, "prompt": text} if "prompt" in options else given

    def output_size(self, size_multiple: int) -> tuple[int, int]:
        """Return (height, width) in pixels; a guess where the call does not say, or is not asked: its picture's."""
        images = self.given_images()
        width, height = images[0].size if images else (UNSTATED_SIDE, UNSTATED_SIDE)
        asked = (self.height if isinstance(self.height, int) else 0, self.width if isinstance(self.width, int) else 0)
        return asked[0] or height, asked[1] or width

    def num_latent_tokens(self, schema: ModelSchema) -> int:
        """Return an estimate of an output's tokens; VAEs of videos make one latent frame of four or of eight."""
        height, width = self.output_size(schema.size_multiple)
        num_frames = 1 + ((self.num_frames or 1) - 1) // FRAMES_OF_A_TOKEN
        return -(-height // TOKEN_SIDE) * -(-width // TOKEN_SIDE) * num_frames


def make_params_cls(
    name: str,
    own: Mapping[str, Option],
    *,
    defaults: Mapping[str, Any],
    excluded: Collection[str],
    refused: Mapping[str, str],
    tasks: tuple[Task, ...],
) -> type[PackageParams]:
    """Return a class of parameters: the common fields but for `excluded`, and `own`, which go before common ones."""
    return dataclasses.make_dataclass(
        name,
        [(key, Any, dataclasses.field(default=None, metadata={"option": known})) for key, known in own.items()],
        bases=(PackageParams,),
        frozen=True,
        kw_only=True,
        namespace={
            "__doc__": f"Parameters of a pipeline without a family: {name}.",
            "defaults": dict(defaults),
            "excluded": frozenset(excluded),
            "refused": dict(refused),
            "tasks": tasks,
            "needs_prompt": bool(tasks) and all("prompt" in task.needs for task in tasks),
        },
    )
