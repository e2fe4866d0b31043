"""What a user may ask of one generation: one dataclass a model, from which every other list of options is made.

The command line's options, the JSON schema, the checks and the defaults all come from `SamplingParams` and its
subclasses. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from safelight.core.options import MEDIA_KINDS, NULL, Option, leaves, option, options_of, without_null
from safelight.core.solver_names import SCHEDULES, num_calls
from safelight.errors import InvalidParameterError, UnknownParameterError

if TYPE_CHECKING:
    from safelight.core.schema import ModelSchema
    from safelight.core.tasks import Task

MAX_SEED = 2**64 - 1
DEFAULT_FPS = 24
"""Of a video's file, where neither the request nor the model says it."""
OF_NO_IMAGE = frozenset(
    (
        *("prompt", "negative_prompt", "seed", "n", "output_type", "num_inference_steps", "scheduler"),
        *("guidance_scale", "fps"),
    )
)
"""Common fields that no input image is prepared by."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a user may ask of one generation, whatever the model. None means unset.

    A family subclasses it with its own fields, and its own values in `defaults`. Names and defaults are those of the
    Diffusers pipeline's `__call__`.
    """

    prompt: str | tuple[str, ...] | None = option("strings", "what to generate", group="basic")
    negative_prompt: str | tuple[str, ...] | None = option("strings", "what to steer away from", group="basic")
    image: tuple[Any, ...] | None = option("images", "the input image, or several", group="basic")
    height: int | None = option("integer", "height in pixels", group="basic", minimum=1, maximum=16384)
    width: int | None = option("integer", "width in pixels", group="basic", minimum=1, maximum=16384)
    num_frames: int | None = option("integer", "number of frames of a video", group="basic", minimum=1, maximum=100_000)
    fps: int | None = option("integer", "frames a second of a video", group="basic", minimum=1, maximum=240)
    num_inference_steps: int | None = option(
        "integer", "denoising steps; more is slower and finer", group="basic", minimum=1, maximum=1000
    )
    guidance_scale: float | None = option("number", "how closely to follow the prompt", group="basic", minimum=0.0)
    seed: int | None = option(
        "integer", "seed of the noise; random if unset, and returned", group="basic", minimum=0, maximum=MAX_SEED
    )
    n: int | None = option(
        "integer", "outputs a prompt, with seeds seed, seed+1 and so on", group="basic", minimum=1, maximum=1024
    )
    scheduler: str | None = option("string", "solver by name, such as euler or unipc_karras; the model's own if unset")
    output_type: str | None = option("string", "form of the result", choices=("pil", "np", "pt", "latent"))

    defaults: ClassVar[Mapping[str, Any]] = {"n": 1, "output_type": "pil"}
    """Values that unset fields take, unless the loaded model has its own."""

    excluded: ClassVar[frozenset[str]] = frozenset()
    """Common fields that this model has no use for: not offered, and refused by name."""

    fits_size: ClassVar[bool] = False
    """Whether any height and width may be asked for, because `output_size` fits them to the model."""

    image_mode: ClassVar[str] = "RGB"
    """What input images are converted to: RGB, or RGBA for a model that uses alpha."""

    makes_alpha: ClassVar[bool] = False
    """Whether the pictures that are made have transparency."""

    needs_prompt: ClassVar[bool] = True
    """Whether there is nothing to make without a prompt, where there is a field for one."""

    max_branches: ClassVar[int] = 1
    """Most model calls of a step, whatever is asked for: one for each branch of guidance."""

    aliases: ClassVar[Mapping[str, str]] = {
        "num_images_per_prompt": "n",
        "num_videos_per_prompt": "n",
        "num_waveforms_per_prompt": "n",
    }
    """Other names under which a field is understood."""

    refused: ClassVar[Mapping[str, str]] = {
        "generator": "use seed",
        "callback_on_step_end": "use stream(), which yields after every step",
        "callback_on_step_end_tensor_inputs": "use stream(), which yields after every step",
        "return_dict": "the result is always an object; use its images or outputs",
        "latents": "use seed, which gives the same noise",
        "prompt_embeds": "use prompt",
        "negative_prompt_embeds": "use negative_prompt",
    }
    """Arguments of Diffusers that are done otherwise here, and how."""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Return the fields that this model takes, in order, by name."""
        return {name: known for name, known in options_of(cls).items() if name not in cls.excluded}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Build from named values.

        Raises:
            UnknownParameterError: for a name that this model does not have; the nearest is suggested.

        """
        known = cls.options()
        values: dict[str, Any] = {}
        for name, value in fields.items():
            target = cls.aliases.get(name, name)
            if target not in known:
                raise UnknownParameterError(name, known, cls.refused.get(name))
            if target in values:
                raise InvalidParameterError(name, value, f"one value, and {target} is given as well")
            values[target] = NULL if value is None and known[target].nullable else value
        return cls(**values)

    @classmethod
    def task_of(cls, given: Collection[str]) -> Task | None:
        """Return what the fields of these names select, of a model that does several things; None of all others."""
        return None

    @classmethod
    def tasks_schema(cls) -> dict[str, Any]:
        """Return what a JSON Schema says of several tasks, beside the fields."""
        return {}

    @classmethod
    def needs_alpha(cls, name: str) -> bool:
        """Say whether a field's picture says by its transparency what it says."""
        return False

    @classmethod
    def mode_of(cls, name: str) -> str:
        """Return what the input images of a field are converted to."""
        return "RGBA" if cls.needs_alpha(name) else cls.image_mode

    def set_fields(self) -> dict[str, Any]:
        """Return what is set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def resolve(self, schema: ModelSchema) -> Self:
        """Return a copy in which every field is checked, and unset ones have the model's defaults.

        Raises:
            InvalidParameterError: naming the field, what it got and what it takes.

        """
        options = self.options()
        checked = {name: options[name].check(name, value) for name, value in self.set_fields().items()}
        resolved = dataclasses.replace(self, **{**schema.defaults_for(checked), **checked})
        resolved.validate(schema, checked)
        return resolved

    def validate(self, schema: ModelSchema, given: Mapping[str, Any]) -> None:
        """Check what concerns several fields, or the loaded model. `given` is what the user set himself."""
        if self.prompt is None and self.needs_prompt and "prompt" in self.options():
            raise InvalidParameterError("prompt", None, "the text to generate from")
        self._validate_size(schema)
        self._validate_num_frames(schema)
        self._validate_scheduler(schema, given)
        count, allowed = len(self.given_images()), schema.num_input_images
        if "image" in self.options() and not allowed[0] <= count <= allowed[1]:
            raise InvalidParameterError("image", f"{count} images", f"{allowed[0]} to {allowed[1]} for this model")
        if isinstance(self.negative_prompt, tuple) and len(self.negative_prompt) != len(self.prompts()):
            raise InvalidParameterError(
                "negative_prompt", f"{len(self.negative_prompt)} texts", f"one, or one a prompt ({len(self.prompts())})"
            )
        if self.seed is not None and self.n is not None and self.seed + self.n - 1 > MAX_SEED:
            raise InvalidParameterError("seed", self.seed, f"at most {MAX_SEED - self.n + 1} with n={self.n}")

    def _validate_size(self, schema: ModelSchema) -> None:
        for name, value in (("height", self.height), ("width", self.width)):
            if value is not None and value % schema.size_multiple and not self.fits_size:
                lower = value // schema.size_multiple * schema.size_multiple
                sizes = [str(size) for size in (lower, lower + schema.size_multiple) if size]
                takes = f"a multiple of {schema.size_multiple}; nearest: {' and '.join(sizes)}"
                raise InvalidParameterError(name, value, takes)

    def _validate_scheduler(self, schema: ModelSchema, given: Mapping[str, Any]) -> None:
        if self.scheduler is None:
            return
        solvers = schema.solvers_for(given)
        if self.scheduler not in solvers:
            takes = f"one of {', '.join(solvers)}" if solvers else "nothing: this model runs with its own alone"
            raise InvalidParameterError("scheduler", self.scheduler, takes)
        for name in SCHEDULES & given.keys() - set(solvers[self.scheduler]):
            takes = f"nothing with scheduler={self.scheduler}, which spaces its steps itself here"
            raise InvalidParameterError(name, given[name], takes)

    def _validate_num_frames(self, schema: ModelSchema) -> None:
        step = schema.frame_step
        if self.num_frames is not None and (self.num_frames - 1) % step:
            lower = (self.num_frames - 1) // step * step + 1
            takes = f"a count of the form {step}k+1; nearest: {lower} and {lower + step}"
            raise InvalidParameterError("num_frames", self.num_frames, takes)

    def warnings(self, schema: ModelSchema, given: Mapping[str, Any]) -> list[str]:
        """Name what was asked for (`given`) and has no effect on this model, or another effect than it seems to."""
        return []

    def output_size(self, size_multiple: int) -> tuple[int, int]:
        """Return (height, width) in pixels of what will be made, fitted to whole multiples where the model fits them.

        Only for resolved parameters.
        """
        assert self.height is not None and self.width is not None
        return self.height, self.width

    @classmethod
    def size_fields(cls, height: int, width: int) -> dict[str, Any]:
        """Return the fields that ask for something of this size, in pixels; none where the model chooses it."""
        return {name: value for name, value in (("height", height), ("width", width)) if name in cls.options()}

    @classmethod
    def example_fields(cls, height: int, width: int) -> dict[str, Any]:
        """Return fields that make some request, whose input images beside `image` have this size; images not."""
        return {"prompt": "a"}

    def image_fields(self) -> dict[str, Any]:
        """Return what is set of the fields that input images may be prepared by: a family's own among them."""
        return {name: value for name, value in self.set_fields().items() if name not in OF_NO_IMAGE}

    def given_images(self) -> list[Any]:
        """Return the input images, one after another, whatever lists they stand in."""
        return [image for image in leaves(self.image) if image is not None]

    def described(self) -> dict[str, Any]:
        """Return what is set as JSON can hold it, null as None; images and clips by their sizes."""
        fields = without_null(self.set_fields())
        for name, known in self.options().items():
            if fields.get(name) is not None and known.kind in MEDIA_KINDS:
                sizes = [each and f"{each.width}x{each.height}" for each in leaves(fields[name])]
                fields[name] = sizes
        return fields

    def frames_a_second(self) -> int:
        """Return the rate of the video's file. Only for resolved parameters."""
        return self.fps or DEFAULT_FPS

    def num_branches(self) -> int:
        """Return the model calls of a step: one, or one for each branch of guidance. Only for resolved parameters."""
        return 1

    def cfg_scale(self) -> float:
        """Return the scale of classifier-free guidance; 1 is none. Only for resolved parameters."""
        return 1.0

    def num_steps(self) -> int:
        """Return the model's steps for an output; 0 where that is not known yet. Only for resolved parameters.

        A solver of second order makes two of all but the last of `num_inference_steps`.
        """
        return num_calls(self.scheduler, self.num_inference_steps or 0)

    def num_latent_tokens(self, schema: ModelSchema) -> int:
        """Return the tokens that an output's latents are to the model. Only for resolved parameters."""
        height, width = self.output_size(schema.size_multiple)
        rows, columns = -(-height // schema.size_multiple), -(-width // schema.size_multiple)
        return rows * columns * (((self.num_frames or 1) - 1) // schema.frame_step + 1)

    def num_sequence_tokens(self, schema: ModelSchema) -> int:
        """Return the tokens of a step's forward, of which each looks at all: the latents, and input images among them.

        Only for resolved parameters.
        """
        return self.num_latent_tokens(schema)

    def num_pixels(self, schema: ModelSchema) -> int:
        """Return the pixels of an output, of a video those of a frame. Only for resolved parameters."""
        height, width = self.output_size(schema.size_multiple)
        return height * width

    def num_pictures(self) -> int:
        """Return how many pictures, or videos, an output has. Only for resolved parameters."""
        return 1

    def prompts(self) -> tuple[str, ...]:
        """Return the prompts, one or several, as a tuple: an empty one for a model that takes no text."""
        return self.prompt if isinstance(self.prompt, tuple) else (self.prompt or "",)

    def split(self) -> list[Self]:
        """Return one copy an output, each with one prompt, one seed and n=1: the outputs of each prompt in turn.

        Every prompt starts at `seed`. Only for resolved parameters with a seed.
        """
        assert self.seed is not None and self.n is not None
        prompts = self.prompts()
        given = self.negative_prompt
        negatives = given if isinstance(given, tuple) else (given,) * len(prompts)
        return [
            dataclasses.replace(
                self,
                prompt=None if self.prompt is None else prompt,
                negative_prompt=negative,
                seed=self.seed + offset,
                n=1,
            )
            for prompt, negative in zip(prompts, negatives, strict=True)
            for offset in range(self.n)
        ]
