"""`Req`: everything that belongs to the generation of one output, and nothing else; and how it changes device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safelight.core.params import SamplingParams

Latents = Tensor | tuple[Tensor, ...]
Prediction = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class ModelCall:
    """One forward of a component, asked for by a pipeline and made by whoever drives it.

    Attributes:
        component: name of the component; the executor knows what it is.
        kwargs: arguments that have a batch dimension, which comes first.
        shared_kwargs: arguments that have none.
        signature: Python values; calls of one component with equal signatures may be stacked.
        key: (request id, branch, step); outputs of one request have it in common.

    """

    component: str
    kwargs: Mapping[str, Tensor]
    shared_kwargs: Mapping[str, Tensor]
    signature: tuple[Hashable, ...]
    key: tuple[str, str, int]

    @property
    def num_rows(self) -> int:
        """The size of the batch dimension."""
        return next(iter(self.kwargs.values())).shape[0]


CallMaker = Callable[[ModelCall], Prediction]
"""Makes a model call: eagerly, compiled, or from a graph. Its caller is in `inference_mode`."""


@dataclass(slots=True, eq=False)
class Req:
    """The state of one generation of one seed; `batch` in stages.

    An unknown name is an error: a family that needs more puts it into its own frozen `cond`.

    Attributes:
        request_id: who asked.
        params: for what, resolved: one prompt, one seed.
        stage: name of the stage that runs, or ran last.
        latents: the noisy latents now, packed as the transformer takes them; a tuple for picture and sound.
        timesteps: [num_inference_steps], the schedule, as the solver gives it.
        num_inference_steps: its length.
        step_index: steps done.
        sigmas: the solver's noise levels, the final one included.
        prompt_embeds: one entry a text encoder, each [1, S, C] or [1, C].
        negative_prompt_embeds: the same for the negative prompt; empty without one.
        prompt_embeds_mask: one entry a text encoder, bool [1, S]: false where an embedding is of padding; None for
            pooled embeddings, and for an encoder that is given images and no mask.
        negative_prompt_embeds_mask: the same for the negative prompt; empty without one.
        image_latents: one entry an encoding, [1, C, H, W] or [1, C, T, H, W] in latent pixels.
        image_embeds: [N, S, C], the image encoder's; None where the model has none.
        generator: source of the noise; on the CPU, so that a seed gives Diffusers' noise.
        raw_latent_shape: the latents' shape before packing.
        scheduler: this request's own solver, which keeps history.
        cond: the family's own frozen dataclass of what its model is given besides.
        pending: the calls last yielded, until their results are sent.
        denoised: the predicted clean latents, where a preview is asked for.
        outputs: finished media: uint8 or float32, a picture [H, W, C] or a video [T, H, W, C]; or latents.
        warnings: what the user should know about this output.
        timings: seconds of each stage so far.
        feature_cache: what a causal VAE remembers of the frames before, while it encodes or decodes.
        host_tensors: of the solver's tensors, those that stay on the CPU whatever the device.

    """

    request_id: str
    params: SamplingParams
    stage: str = ""
    latents: Latents | None = None
    timesteps: Tensor | None = None
    num_inference_steps: int = 0
    step_index: int = 0
    sigmas: list[float] = field(default_factory=list)
    prompt_embeds: list[Tensor] = field(default_factory=list)
    negative_prompt_embeds: list[Tensor] = field(default_factory=list)
    prompt_embeds_mask: list[Tensor | None] = field(default_factory=list)
    negative_prompt_embeds_mask: list[Tensor | None] = field(default_factory=list)
    image_latents: list[Tensor] = field(default_factory=list)
    image_embeds: Tensor | None = None
    generator: torch.Generator | None = None
    raw_latent_shape: tuple[int, ...] = ()
    scheduler: Any = None
    cond: Any = None
    pending: list[ModelCall] = field(default_factory=list)
    denoised: Tensor | None = None
    outputs: list[Any] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    feature_cache: dict[str, list[Any]] = field(default_factory=dict)
    host_tensors: frozenset[str] | None = None


def move(req: Req, device: torch.device | str) -> None:
    """Move every tensor of the request to `device`, in place; aliases stay aliases.

    Finished media are on the host, and stay there. What the solver keeps on the CPU by its own choice stays there too,
    and is there after a way to the host and back.
    """
    target = torch.device(device)
    if req.host_tensors is None and req.scheduler is not None:
        req.host_tensors = frozenset(_solver_tensors_on_host(req))
    media = req.outputs
    map_tensors(req, lambda tensor: tensor.to(target), keep=req.host_tensors or frozenset())
    req.outputs = media


def map_tensors(req: Req, change: Callable[[Tensor], Tensor], keep: frozenset[str] = frozenset()) -> None:
    """Replace each tensor of the request by `change(tensor)`, once however often it is referred to.

    Args:
        req: changed in place.
        change: gives the replacement.
        keep: names of the solver's attributes that are left alone.

    """
    changed: dict[int, tuple[Tensor, Tensor]] = {}

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in changed:
            changed[id(tensor)] = (tensor, change(tensor))  # the old one is kept, or its id could be used again
        return changed[id(tensor)][1]

    for index, solver in enumerate(_solvers(req)):
        state = vars(solver)
        for name in state.keys() - _SOLVER_CONFIG:
            if f"{index}.{name}" not in keep:
                state[name] = _mapped(state[name], once)
    req.latents = _mapped(req.latents, once)
    req.timesteps = _mapped(req.timesteps, once)
    req.prompt_embeds = _mapped(req.prompt_embeds, once)
    req.negative_prompt_embeds = _mapped(req.negative_prompt_embeds, once)
    req.prompt_embeds_mask = _mapped(req.prompt_embeds_mask, once)
    req.negative_prompt_embeds_mask = _mapped(req.negative_prompt_embeds_mask, once)
    req.image_latents = _mapped(req.image_latents, once)
    req.image_embeds = _mapped(req.image_embeds, once)
    req.cond = _mapped(req.cond, once)
    req.pending = _mapped(req.pending, once)
    req.denoised = _mapped(req.denoised, once)
    req.outputs = _mapped(req.outputs, once)
    req.feature_cache = _mapped(req.feature_cache, once)


_SOLVER_CONFIG = frozenset({"_internal_dict"})


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Rebuild plain containers and dataclasses with their tensors changed; anything else is returned as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [_mapped(entry, change) for entry in value]
    if type(value) is tuple:
        return tuple(_mapped(entry, change) for entry in value)
    if type(value) is dict:
        return {key: _mapped(entry, change) for key, entry in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: _mapped(entry, change) for name, entry in vars(value).items()})
    return value


def _solvers(req: Req) -> tuple[Any, ...]:
    if req.scheduler is None:
        return ()
    return req.scheduler if isinstance(req.scheduler, tuple) else (req.scheduler,)


def _solver_tensors_on_host(req: Req) -> list[str]:
    """Name the solver's tensors that lie on the CPU while the request itself is on an accelerator."""
    if not isinstance(req.timesteps, Tensor) or req.timesteps.device.type == "cpu":
        return []
    return [
        f"{index}.{name}"
        for index, solver in enumerate(_solvers(req))
        for name, value in vars(solver).items()
        if isinstance(value, Tensor) and value.device.type == "cpu"
    ]
