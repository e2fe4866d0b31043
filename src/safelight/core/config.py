"""`PipelineConfig`: what is static for a model, and the callbacks by which the shared stages learn its conventions."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from safelight.core.params import SamplingParams
from safelight.core.request import Latents, Prediction, Req
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.core.solver import Traits, scales_latents, scales_noise, schedule_traits
from safelight.errors import ModelIndexError

COND, UNCOND = "cond", "uncond"
P = TypeVar("P", bound=SamplingParams)
ComponentConfigs = Mapping[str, Mapping[str, Any]]
"""The components' JSON by their names; `model_index` is the index itself."""


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """How one text encoder takes one request's text.

    Attributes:
        prompt: the text, in its template where the model has one.
        negative_prompt: the text of the negative branch, likewise.
        max_length: tokens; longer texts are cut, with a warning.
        output: which output of the encoder is the embedding.
        padding: whether texts are padded to `max_length`, or not at all.
        attention_mask: whether the encoder is told which tokens are padding.
        zero_padding: whether the embeddings of padding are set to zero.
        drop_prefix: tokens of the template whose embeddings are dropped.
        max_embeds: embeddings that are kept after that; None keeps all.

    """

    prompt: str
    negative_prompt: str
    max_length: int
    output: Literal["last_hidden_state", "pooler_output"]
    padding: Literal["max_length", "do_not_pad"] = "max_length"
    attention_mask: bool = False
    zero_padding: bool = False
    drop_prefix: int = 0
    max_embeds: int | None = None


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What is static for a model. Callbacks take the request, return values, and keep nothing.

    Attributes:
        vae_scale_factor: pixels a latent pixel, along one side.
        latent_channels: channels of the VAE's latents.
        vae_scale, vae_shift: latents for the transformer are `(vae - vae_shift) * vae_scale`; a number, or one a
            channel.

    """

    task: ClassVar[ModelTaskType]
    architecture: ClassVar[type[Any]]
    """The dataclass of the transformer's numbers, with the reference's defaults."""
    num_input_images: ClassVar[tuple[int, int]] = (0, 0)
    """The least and the most input images."""
    precisions: ClassVar[Mapping[str, str]] = {}
    """Components that have a precision of their own, whatever the rest has."""
    shared_kwargs: ClassVar[frozenset[str]] = frozenset()
    """Names of the transformer's arguments that have no batch dimension."""
    leaves_flow_sigmas: ClassVar[bool] = False
    """Whether a solver with `use_flow_sigmas` is left to space the noise levels, as some references do."""
    latent_dtype: ClassVar[torch.dtype | None] = None
    """Of the latents between steps; None is the transformer's."""

    vae_scale_factor: int
    latent_channels: int
    vae_scale: float | tuple[float, ...]
    vae_shift: float | tuple[float, ...]

    @classmethod
    def from_model(cls, component_configs: ComponentConfigs) -> PipelineConfig:
        """Build from the components' JSON: the class that has the model's conventions, with the values stated there.

        Raises:
            ModelIndexError: if the components do not fit each other.

        """
        chosen = cls.variant_of(component_configs)
        configs = {
            name: with_defaults(chosen.architecture, config) if name.startswith("transformer") else config
            for name, config in component_configs.items()
        }
        chosen.check_components(configs)
        return chosen(**chosen.fields_of(configs))

    @classmethod
    def variant_of(cls, configs: ComponentConfigs) -> type[PipelineConfig]:
        """Return the class to build: another one, where models of one pipeline class differ in their conventions."""
        return cls

    @classmethod
    def check_components(cls, configs: ComponentConfigs) -> None:
        """Refuse components that do not fit each other: a request would end where they meet.

        Raises:
            ModelIndexError: naming component and field.

        """

    @classmethod
    def fields_of(cls, configs: ComponentConfigs) -> dict[str, Any]:
        """Return the values of the fields; those of transformers are over the defaults of `architecture`."""
        raise NotImplementedError

    def model_schema(
        self, model: str, pipeline_name: str, params_cls: type[SamplingParams], defaults: Mapping[str, Any]
    ) -> ModelSchema:
        """Say what the loaded model takes. `defaults` are those that its repository states for itself."""
        return ModelSchema(
            model=model,
            pipeline_name=pipeline_name,
            task=self.task,
            params_cls=params_cls,
            defaults={**params_cls.defaults, **self.own_defaults(), **defaults},
            size_multiple=self.size_multiple,
            num_input_images=self.num_input_images,
            frame_step=self.frame_step,
            capabilities=self.capabilities(),
        )

    def own_defaults(self) -> dict[str, Any]:
        """Return defaults that follow from the components, such as height and width."""
        return {}

    @property
    def size_multiple(self) -> int:
        """Pixels of which heights and widths are multiples."""
        return self.vae_scale_factor

    @property
    def frame_step(self) -> int:
        """Frame counts are one more than a multiple of it."""
        return 1

    def capabilities(self) -> frozenset[str]:
        """Return what the components allow, in the words of the parameters."""
        return frozenset()

    def validate(self, batch: Req) -> None:
        """Check what neither the parameters nor the schema can. Raises `InvalidParameterError`."""

    # Text

    def encode_prompt_spec(self, index: int, batch: Req) -> PromptSpec:
        """Return how the text encoder number `index` takes this request's text."""
        raise NotImplementedError

    def text_encoder_inputs(
        self, spec: PromptSpec, text: str, batch: Req, tokenizer: Any, processor: Any
    ) -> dict[str, Tensor]:
        """Return the arguments of a text encoder: the token ids [1, S], and what else it is given.

        Args:
            spec: how the encoder takes text.
            text: the prompt, or the negative prompt.
            batch: the request.
            tokenizer: the encoder's.
            processor: of the images that go with the text; None where the model has none.

        An `attention_mask` among them, [1, S], is kept beside the embeddings, whether the encoder is given it or not.

        """
        tokens = tokenizer(text, padding=spec.padding, max_length=spec.max_length, truncation=True, return_tensors="pt")
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}

    # Images

    def num_vae_inputs(self, batch: Req) -> int:
        """Return how many pictures or clips the VAE encodes for this request."""
        return len(batch.params.image or ())

    def prepare_vae_input(self, batch: Req, index: int) -> Tensor:
        """Return what the VAE encodes as number `index`: float32 [1, C, H, W] or [1, C, T, H, W] in [-1, 1]."""
        raise NotImplementedError

    def images_to_embed(self, batch: Req) -> list[Image.Image]:
        """Return the pictures that the image encoder embeds."""
        return []

    # Latents

    def output_size(self, batch: Req) -> tuple[int, int]:
        """Return the (height, width) in pixels that is made."""
        return batch.params.output_size(self.size_multiple)

    def latent_size(self, batch: Req) -> tuple[int, int]:
        """Return the same (height, width) in latent pixels."""
        height, width = self.output_size(batch)
        return height // self.vae_scale_factor, width // self.vae_scale_factor

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """Return the shape of the latents before packing, [1, C, H, W] or [1, C, T, H, W]."""
        raise NotImplementedError

    def maybe_pack_latents(self, latents: Tensor, batch: Req) -> Latents:
        """Bring fresh noise into the form that the transformer takes."""
        return latents

    def post_denoising_loop(self, latents: Latents, batch: Req) -> Tensor:
        """Bring denoised latents back into `raw_latent_shape`."""
        assert isinstance(latents, Tensor)
        return latents

    def latent_output(self, latents: tuple[Tensor, ...], batch: Req) -> tuple[Tensor, ...]:
        """Return what a user gets who asks for latents: those of the end of the loop, as they are."""
        return latents

    def get_decode_scale_and_shift(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale, shift), to broadcast over `like`: the VAE is given `latents / scale + shift`."""
        return per_channel(self.vae_scale, like), per_channel(self.vae_shift, like)

    # Schedule

    def takes_solver(self, own: Any, solver: Any) -> Traits | None:
        """Return which lists of a schedule a solver takes in the loop; None where it does not fit.

        Args:
            own: the model's.
            solver: another, with a schedule.

        """
        if scales_latents(solver) or scales_noise(solver) or "set_begin_index" not in dir(solver):
            return None
        return schedule_traits(
            solver,
            gives_sigmas=type(self).prepare_sigmas is not PipelineConfig.prepare_sigmas,
            gives_mu=type(self).prepare_mu is not PipelineConfig.prepare_mu,
            leaves_flow_sigmas=self.leaves_flow_sigmas,
        )

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """Return the noise levels given to the request's solver; None leaves them to it."""
        return None

    def prepare_timesteps(self, batch: Req) -> list[float] | None:
        """Return the timesteps given to the solver beside the noise levels; None leaves them to it."""
        return None

    def prepare_mu(self, batch: Req, scheduler_config: Mapping[str, Any]) -> float | None:
        """Return the dynamic shift of the schedule; None where there is none."""
        return None

    # Denoising

    def prepare_cond(self, batch: Req, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the family's `cond`, once a request: whatever the transformer is given at every step."""
        raise NotImplementedError

    def should_use_guidance(self, batch: Req) -> bool:
        """Say whether this request has a negative branch."""
        return batch.params.num_branches() > 1

    def guidance_scale(self, batch: Req, t: Tensor) -> float:
        """Return the scale of classifier-free guidance at this step."""
        return batch.params.cfg_scale()

    def branches(self, batch: Req) -> tuple[str, ...]:
        """Return the names of the guidance branches, in order."""
        return (COND, UNCOND) if self.should_use_guidance(batch) else (COND,)

    def select_component(self, batch: Req, t: Tensor) -> str:
        """Return the name of the transformer that runs this step."""
        return "transformer"

    def prepare_pos_cond_kwargs(self, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the positive branch's call."""
        return self.transformer_kwargs(COND, batch, latent_model_input, t)

    def prepare_neg_cond_kwargs(self, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the negative branch's call."""
        return self.transformer_kwargs(UNCOND, batch, latent_model_input, t)

    def transformer_kwargs(self, branch: str, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the arguments of a branch's call, where branches differ in their text alone."""
        raise NotImplementedError

    def prepare_branch_kwargs(
        self, branch: str, batch: Req, latent_model_input: Latents, t: Tensor
    ) -> dict[str, Tensor]:
        """Return the arguments of a branch's call."""
        if branch == COND:
            return self.prepare_pos_cond_kwargs(batch, latent_model_input, t)
        return self.prepare_neg_cond_kwargs(batch, latent_model_input, t)

    def call_signature(self, branch: str, batch: Req) -> tuple[Hashable, ...]:
        """Return what must agree for two calls to be stacked: sizes, never scales that differ by row."""
        embeds = embeds_of(branch, batch)
        images = tuple(tuple(latents.shape) for latents in batch.image_latents)
        return (batch.raw_latent_shape, tuple(tuple(entry.shape[1:]) for entry in embeds), images)

    def combine_guidance(self, batch: Req, predictions: Sequence[Prediction], t: Tensor) -> Prediction:
        """Join the branches' predictions, in the order of `branches`, into one."""
        if len(predictions) == 1:
            return predictions[0]
        positive, negative = predictions
        assert isinstance(positive, Tensor) and isinstance(negative, Tensor)
        return negative + self.guidance_scale(batch, t) * (positive - negative)


def embeds_of(branch: str, batch: Req) -> list[Tensor]:
    """Return the text embeddings of a branch, one entry a text encoder."""
    return batch.prompt_embeds if branch == COND else batch.negative_prompt_embeds


def masks_of(branch: str, batch: Req) -> list[Tensor | None]:
    """Return which of a branch's text embeddings are of tokens, one entry a text encoder."""
    return batch.prompt_embeds_mask if branch == COND else batch.negative_prompt_embeds_mask


def texts_of(batch: Req) -> tuple[str, str]:
    """Return the prompt and the negative prompt, empty where there is none."""
    negative = batch.params.negative_prompt or ""
    assert isinstance(negative, str)
    return batch.params.prompts()[0], negative


def params_of(batch: Req, cls: type[P]) -> P:
    """Return the request's parameters as those of a family."""
    assert isinstance(batch.params, cls)
    return batch.params


def with_defaults(architecture: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a component's configuration over the defaults of its architecture, a dataclass."""
    return {**{field.name: field.default for field in dataclasses.fields(architecture)}, **config}


def latent_statistics(vae: Mapping[str, Any]) -> dict[str, Any]:
    """Return `vae_scale` and `vae_shift` as a VAE's configuration states them: one number, or one a channel."""
    if vae.get("latents_std"):
        scale = tuple(1.0 / std for std in vae["latents_std"])
        return {"vae_scale": scale, "vae_shift": tuple(vae["latents_mean"])}
    return {"vae_scale": vae.get("scaling_factor", 0.18215), "vae_shift": vae.get("shift_factor") or 0.0}


def check_field(component: str, name: str, got: object, allowed: Collection[object]) -> None:
    """Refuse a value of a component's configuration that a request could not be made with.

    Raises:
        ModelIndexError: naming component and field, what is there and what it takes.

    """
    if got not in allowed:
        takes = " or ".join(map(repr, allowed)) or "nothing here"
        raise ModelIndexError(
            f"{component}/config.json: {name}: got {got!r}; with the rest of this model it takes {takes}"
        )


def check_rotary(component: str, axes_dims: Sequence[int], num_axes: int, head_dim: int) -> None:
    """Refuse channels of a head that do not turn in pairs, or are not as many as the head has.

    Raises:
        ModelIndexError: naming component and field.

    """
    check_field(component, "axes_dims_rope, their number", len(axes_dims), (num_axes,))
    check_field(component, "axes_dims_rope, their sum", sum(axes_dims), (head_dim,))
    check_field(component, "axes_dims_rope, odd ones", [dim for dim in axes_dims if dim % 2], ([],))


def per_channel(values: float | tuple[float, ...], like: Tensor) -> Tensor:
    """Return a number, or one a channel, so that it broadcasts over `like`, [B, C, ...]."""
    given = torch.tensor(values, dtype=like.dtype, device=like.device)
    return given.view(1, -1, *([1] * (like.ndim - 2)))
