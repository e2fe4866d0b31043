"""How a VAE is run in units: which of them a call has, and what goes from one to the next."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from safelight.stages.vae import INPUT, VAE, Decoder, Piece, Unit, whole


class Rows(Decoder):
    """A unit a row; each shows its row of the latents, plus what the units before left."""

    def __init__(self, costs):
        self.costs = costs

    def begin(self, latents):
        return {"latents": latents, "before": torch.zeros(())}

    def units(self, latent_shape):
        for row, cost in enumerate(self.costs):
            yield Unit(cost, functools.partial(self.work, row))

    def work(self, row, state):
        state["before"] = state["before"] + 1
        return [Piece(0, row, state["latents"][0, :, None, row : row + 1] + state["before"])]

    def output_shape(self, latent_shape):
        return (1, 1, *latent_shape[-2:])


def vae(costs, unit_cost):
    return VAE(None, Rows(costs), unit_cost=unit_cost)


@pytest.mark.parametrize(
    ("costs", "unit_cost", "calls"),
    [
        ([1, 1, 1, 1], 2, [(0, 2), (2, 4)]),
        ([1, 1, 1], 9, [(0, 3)]),
        ([5, 1, 5], 2, [(0, 1), (1, 2), (2, 3)]),
        ([1, 1, 2], 3, [(0, 2), (2, 3)]),
    ],
)
def test_a_call_has_units_up_to_its_cost_and_one_at_least(costs, unit_cost, calls):
    assert list(vae(costs, unit_cost).calls((1, 1, len(costs), 2))) == calls


@pytest.mark.parametrize("unit_cost", [1, 2, 100])
def test_a_decode_is_the_same_however_it_is_cut(unit_cost):
    latents = torch.arange(8.0).view(1, 1, 4, 2)
    run, state = vae([1] * 4, unit_cost), {INPUT: latents}
    rows: list[tuple[int, list[float]]] = []
    for units in run.calls(latents.shape):
        made = run.decoded(state, latents.shape, units)
        state = made["state"]
        rows += [(piece.top, piece.pixels.flatten().tolist()) for piece in made["pieces"]]
    assert rows == [(row, [2 * row + row + 1.0, 2 * row + row + 2.0]) for row in range(4)]


def test_the_librarys_own_way_is_one_unit():
    library = SimpleNamespace(
        encode=lambda pixels: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pixels + 1)),
        decode=lambda latents, return_dict: (latents * 2,),
    )
    run = whole(library)
    assert list(run.calls((2, 1, 4, 4))) == [(0, 1)]
    assert run.decoded({INPUT: torch.ones(2)}, (2,), (0, 1))["pieces"].tolist() == [2, 2]
    assert run.num_encodes((1, 3, 8, 8)) == 1
    assert run.encoded({INPUT: torch.ones(2)}, 0)["mode"].tolist() == [2, 2]
