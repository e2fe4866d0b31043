"""Parameters of a pipeline that has no family here: made from what its own call takes. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from safelight.core.options import Option
from safelight.core.params import SamplingParams
from safelight.errors import InvalidParameterError

if TYPE_CHECKING:
    from safelight.core.schema import ModelSchema

UNSTATED_SIDE, TOKEN_SIDE, FRAMES_OF_A_TOKEN = 1024, 16, 8
"""Pixels of a side that the call leaves to the model, and of a latent token's, and its frames: for the estimate of a
request's cost."""
FRAME_RATE = "frame_rate"
"""What some pipelines call the frames a second that they are told."""


class PackageParams(SamplingParams):
    """Parameters of a pipeline of the package, whose model alone knows its own size and multiples."""

    required: ClassVar[frozenset[str]] = frozenset()
    """What the call has no default for."""

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

    def validate(self, schema: ModelSchema, given: Mapping[str, Any]) -> None:
        """Check that what the call cannot do without is there."""
        super().validate(schema, given)
        for name in sorted(self.required):
            if vars(self)[name] is None:
                raise InvalidParameterError(name, None, self.options()[name].takes())

    def output_size(self, size_multiple: int) -> tuple[int, int]:
        """Return (height, width) in pixels; a guess where the call does not say, or is not asked."""
        height, width = (side if isinstance(side, int) else UNSTATED_SIDE for side in (self.height, self.width))
        return height, width

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
    required: Collection[str],
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
            "required": frozenset(required),
            "needs_prompt": "prompt" in required,
        },
    )
