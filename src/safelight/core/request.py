"""`Req`: everything that belongs to the generation of one output, and nothing else; and how it changes device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safelight.core.calls import CallKey, ModelCall
from safelight.core.params import SamplingParams
from safelight.core.trees import map_tree

Latents = Tensor | tuple[Tensor, ...]
Prediction = Tensor | tuple[Tensor, ...]


@dataclass(slots=True, eq=False)
class Req:
    """The state of one generation of one seed; `batch` in stages.

    An unknown name is an error: a family that needs more puts it into its own frozen `cond`.

    Attributes:
        request_id: who asked.
        params: for what, resolved: one prompt, one seed.
        output_index: which of the request's outputs it is, from 0.
        model: whose request it is, where an engine has several models; its first is the empty name.
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
        stage_state: what the running stage keeps from one yield to the next, of its own dataclass; None at its end.
        host_tensors: of the solver's tensors, those that stay on the CPU whatever the device.

    """

    request_id: str
    params: SamplingParams
    output_index: int = 0
    model: str = ""
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
    stage_state: Any = None
    host_tensors: frozenset[str] | None = None

    def key(self, branch: str, step: int = 0) -> CallKey:
        """Return the name of a call of this output."""
        return CallKey(f"{self.request_id}/{self.output_index}", branch, step)

    @property
    def in_loop(self) -> bool:
        """Whether the pending calls are a step's: those of encoders and VAEs are made one by one."""
        return any(call.signature is not None for call in self.pending)


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
                state[name] = map_tree(state[name], once)
    req.latents = map_tree(req.latents, once)
    req.timesteps = map_tree(req.timesteps, once)
    req.prompt_embeds = map_tree(req.prompt_embeds, once)
    req.negative_prompt_embeds = map_tree(req.negative_prompt_embeds, once)
    req.prompt_embeds_mask = map_tree(req.prompt_embeds_mask, once)
    req.negative_prompt_embeds_mask = map_tree(req.negative_prompt_embeds_mask, once)
    req.image_latents = map_tree(req.image_latents, once)
    req.image_embeds = map_tree(req.image_embeds, once)
    req.cond = map_tree(req.cond, once)
    req.pending = map_tree(req.pending, once)
    req.denoised = map_tree(req.denoised, once)
    req.outputs = map_tree(req.outputs, once)
    req.stage_state = map_tree(req.stage_state, once)


_SOLVER_CONFIG = frozenset({"_internal_dict"})


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
