"""Which classes a family's components may be of: the libraries', by tables of ours alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safelight.errors import ModelIndexError, nearest
from safelight.loading.variants import STEMS

LIBRARY_CLASSES: Mapping[str, str] = {
    "AutoencoderKL": "diffusers:AutoencoderKL",
    "AutoencoderKLQwenImage": "diffusers:AutoencoderKLQwenImage",
    "CLIPImageProcessor": "transformers:CLIPImageProcessorPil",
    "CLIPImageProcessorFast": "transformers:CLIPImageProcessorPil",
    "CLIPImageProcessorPil": "transformers:CLIPImageProcessorPil",
    "CLIPTextModel": "transformers:CLIPTextModel",
    "CLIPTokenizer": "transformers:CLIPTokenizer",
    "CLIPTokenizerFast": "transformers:CLIPTokenizer",
    "CLIPVisionModel": "transformers:CLIPVisionModel",
    "FlowMatchEulerDiscreteScheduler": "diffusers:FlowMatchEulerDiscreteScheduler",
    "Qwen2Tokenizer": "transformers:Qwen2Tokenizer",
    "Qwen2TokenizerFast": "transformers:Qwen2Tokenizer",
    "Qwen2VLProcessor": "transformers:Qwen2VLImageProcessorPil",
    "T5EncoderModel": "transformers:T5EncoderModel",
    "T5Tokenizer": "transformers:T5Tokenizer",
    "T5TokenizerFast": "transformers:T5Tokenizer",
    "UMT5EncoderModel": "transformers:UMT5EncoderModel",
    "UniPCMultistepScheduler": "diffusers:UniPCMultistepScheduler",
}
"""Components that the libraries load: class name in the index to `library:Class`."""

LIBRARY_STEMS: Mapping[str, str] = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Name of the checkpoint, without ending, that each library reads."""


def target_of(component: str, class_name: str, own: Mapping[str, str]) -> str:
    """Return `module:Class` of a component's class.

    Args:
        component: its name, for messages.
        class_name: what the index gives it.
        own: the family's own classes.

    Raises:
        ModelIndexError: for a class that is in neither table.

    """
    table = {**LIBRARY_CLASSES, **own}
    if class_name not in table:
        raise ModelIndexError(
            f"model_index.json: {component}: class {class_name!r} is not supported; {nearest(class_name, table)}"
        )
    return table[class_name]


def library_of(target: str) -> str | None:
    """Return which library a class is of; None for our own."""
    package = target.partition(":")[0]
    return package if package in LIBRARY_STEMS else None


@dataclass(frozen=True)
class WeightsFile:
    """What the file of a class's weights may be beside its own.

    Attributes:
        surplus: first parts of keys that belong to the whole model, of which the class is a part: they are left there.
        renamed: patterns of older or newer keys, and what they are, where the class alone would not know.

    """

    surplus: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)


_WHOLE_CLIP = frozenset(
    {"text_model", "vision_model", "text_projection", "visual_projection", "logit_scale", "logit_bias"}
)
WEIGHTS_FILES: Mapping[str, WeightsFile] = {
    "transformers:CLIPTextModel": WeightsFile(_WHOLE_CLIP),
    "transformers:CLIPVisionModel": WeightsFile(_WHOLE_CLIP),
    "transformers:T5EncoderModel": WeightsFile(frozenset({"decoder", "lm_head"})),
    "transformers:UMT5EncoderModel": WeightsFile(frozenset({"decoder", "lm_head"})),
    # Its base class takes `model.` off all keys alike, and so loses those of newer files that have it before `visual.`.
    "transformers:Qwen2_5_VLModel": WeightsFile(frozenset({"lm_head"}), {r"^model\.visual\.": "visual."}),
}
"""By `library:Class`; a class that is not here has a file of its own keys alone."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a component's weights and configuration come from.

    Attributes:
        folder: the component's.
        target: `module:Class`, from the tables.
        variant: of its weights, such as `fp16`; None is the plain files.
        optional_parts: submodules that the pipeline never runs: it loads without them where the file has none of them.

    """

    folder: Path
    target: str
    variant: str | None = None
    optional_parts: tuple[str, ...] = ()

    @property
    def stems(self) -> tuple[str, ...]:
        """Names, without ending, under which its weights may be."""
        library = library_of(self.target)
        return STEMS if library is None else (LIBRARY_STEMS[library],)
