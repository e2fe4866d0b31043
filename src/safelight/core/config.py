"""`PipelineConfig`: what is static for a model, and the callbacks by which the shared stages learn its conventions."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from PIL import Image
from torch import Tensor

from safelight.core.params import SamplingParams
from safelight.core.request import Latents, Prediction, Req
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.errors import ModelIndexError

COND, UNCOND = "cond", "uncond"


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
    precisions: ClassVar[Mapping[str, str]] = {}
    """Components that have a precision of their own, whatever the rest has."""
    shared_kwargs: ClassVar[frozenset[str]] = frozenset()
    """Names of the transformer's arguments that have no batch dimension."""
    latent_dtype: ClassVar[torch.dtype | None] = None
    """Of the latents between steps; None is the transformer's."""

    vae_scale_factor: int
    latent_channels: int
    vae_scale: float | tuple[float, ...]
    vae_shift: float | tuple[float, ...]

    @classmethod
    def from_model(cls, component_configs: Mapping[str, Mapping[str, Any]]) -> Self:
        """Build from the components' JSON, by their names; `model_index` is the index itself."""
        raise NotImplementedError

    def model_schema(
        self, model: str, pipeline_name: str, params_cls: type[SamplingParams], defaults: Mapping[str, Any]
    ) -> ModelSchema:
        """Say what the loaded model takes. `defaults` are those that its repository states for itself."""
        raise NotImplementedError

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
        inputs: dict[str, Tensor] = {"input_ids": tokens.input_ids}
        return {**inputs, "attention_mask": tokens.attention_mask}

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

    def get_decode_scale_and_shift(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale, shift), to broadcast over `like`: the VAE is given `latents / scale + shift`."""
        return per_channel(self.vae_scale, like), per_channel(self.vae_shift, like)

    # Schedule

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """Return the noise levels given to the solver; None leaves them to it."""
        raise NotImplementedError

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
        raise NotImplementedError

    def branches(self, batch: Req) -> tuple[str, ...]:
        """Return the names of the guidance branches, in order."""
        return (COND, UNCOND) if self.should_use_guidance(batch) else (COND,)

    def select_component(self, batch: Req, t: Tensor) -> str:
        """Return the name of the transformer that runs this step."""
        return "transformer"

    def prepare_pos_cond_kwargs(self, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the positive branch's call."""
        raise NotImplementedError

    def prepare_neg_cond_kwargs(self, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the negative branch's call."""
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
        embeds = batch.prompt_embeds if branch == COND else batch.negative_prompt_embeds
        images = tuple(tuple(latents.shape) for latents in batch.image_latents)
        return (batch.raw_latent_shape, tuple(tuple(entry.shape[1:]) for entry in embeds), images)

    def combine_guidance(self, batch: Req, predictions: Sequence[Prediction], t: Tensor) -> Prediction:
        """Join the branches' predictions, in the order of `branches`, into one."""
        if len(predictions) == 1:
            return predictions[0]
        positive, negative = predictions
        assert isinstance(positive, Tensor) and isinstance(negative, Tensor)
        return negative + self.guidance_scale(batch, t) * (positive - negative)


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
