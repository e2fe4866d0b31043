"""A request's state: its fields, and what moving it does."""

from __future__ import annotations

import types
from dataclasses import dataclass

import pytest
import torch

from safelight.core.params import SamplingParams
from safelight.core.request import Req, map_tensors, move


@dataclass(frozen=True)
class Cond:
    """What a family might put there."""

    ids: torch.Tensor
    name: str = "x"


def req():
    return Req(request_id="r", params=SamplingParams(prompt="x"))


def test_an_unknown_field_of_a_request_is_an_error():
    request = req()
    with pytest.raises(AttributeError):
        request.something = 1


def test_two_requests_share_nothing():
    one, other = req(), req()
    one.prompt_embeds.append(torch.zeros(1))
    one.sigmas.append(1.0)
    assert other.prompt_embeds == [] and other.sigmas == [] and one != other


def test_every_tensor_moves_once_and_aliases_stay_aliases():
    request = req()
    request.latents = request.denoised = torch.ones(2)
    request.prompt_embeds = [torch.ones(1), request.latents]
    request.cond = Cond(request.prompt_embeds[0])
    request.scheduler = types.SimpleNamespace(sample=request.latents, history=[None, {"last": request.latents}])
    changed: list[torch.Tensor] = []

    def change(tensor):
        changed.append(tensor)
        return tensor + 1

    map_tensors(request, change)
    assert len(changed) == 2
    assert request.latents is request.denoised is request.prompt_embeds[1] is request.scheduler.sample
    assert request.scheduler.history == [None, {"last": request.latents}]
    assert request.cond.ids is request.prompt_embeds[0] and request.cond.name == "x"
    assert request.latents.tolist() == [2.0, 2.0]


def test_finished_media_stay_on_the_host():
    request = req()
    request.outputs, request.latents = [torch.zeros(1)], torch.zeros(1)
    move(request, "meta")
    assert request.latents.device.type == "meta" and request.outputs[0].device.type == "cpu"


def solver(**attributes):
    return types.SimpleNamespace(**attributes)


def test_move_keeps_what_the_solver_keeps_on_the_host():
    """On an accelerator, what the solver has on the CPU stays there; after a way to the host it is still known."""
    request = req()
    request.timesteps = torch.ones(2, device="meta")
    request.scheduler = solver(
        sigmas=torch.ones(3), timesteps=request.timesteps, model_outputs=[None, request.timesteps]
    )
    host = request.scheduler.sigmas
    move(request, "meta")
    assert request.scheduler.sigmas is host
    assert request.host_tensors == frozenset({"0.sigmas"})
    request.timesteps = torch.ones(2)  # as after a way to the host, which `meta` cannot give
    request.scheduler.timesteps, request.scheduler.model_outputs = request.timesteps, [None, request.timesteps]
    move(request, "meta")
    assert request.scheduler.sigmas.device.type == "cpu"
    assert request.scheduler.timesteps.device.type == "meta"
    assert request.scheduler.model_outputs[1] is request.timesteps is request.scheduler.timesteps


def test_move_leaves_a_solvers_configuration_alone():
    request = req()
    config = {"trained_betas": torch.ones(2)}
    request.scheduler = (solver(_internal_dict=config, step=torch.zeros(1)), solver(step=torch.zeros(1)))
    map_tensors(request, lambda tensor: tensor + 1)
    assert request.scheduler[0]._internal_dict is config and config["trained_betas"].sum() == 2
    assert [each.step.item() for each in request.scheduler] == [1.0, 1.0]
