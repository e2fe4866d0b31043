"""Pools of ranks, and checkpoints that divide."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel import checkpoints, work
from tests.parallel.pool import RankPool
from tests.recipes import all_recipes


@pytest.fixture(scope="session")
def pools(tmp_path_factory):
    made = {}

    def pool(size):
        if size not in made or made[size].broken:
            made[size] = RankPool(size, tmp_path_factory.mktemp(f"ranks{size}"))
        return made[size]

    yield pool
    for one in made.values():
        one.close()


@pytest.fixture(scope="session")
def compare(pools, tmp_path_factory):
    """Return (largest difference from one rank, what rank 0 tells) of a case in a layout."""

    @cache
    def folder(recipe, variant):
        return str(checkpoints.build(all_recipes()[recipe], variant, tmp_path_factory.mktemp("checkpoint")))

    @cache
    def expected(recipe, case, output_type, fields):
        (found,) = [entry for entry in all_recipes()[recipe].cases if entry.name == case]
        return work.alone(folder(recipe, found.variant), recipe, case, output_type, **dict(fields))

    def run(recipe, case, layout, output_type="latent", **fields):
        (found,) = [entry for entry in all_recipes()[recipe].cases if entry.name == case]
        sizes = [size for axis, size in layout.items() if axis != "vae"]
        num_ranks = int(torch.tensor(sizes or [2]).prod())
        out = tmp_path_factory.mktemp("out")
        told = pools(num_ranks).run(
            "together",
            folder=folder(recipe, found.variant),
            recipe=recipe,
            case=case,
            layout=layout,
            out=str(out),
            output_type=output_type,
            **fields,
        )
        wanted = expected(recipe, case, output_type, tuple(fields.items()))
        outputs = [load_file(out / f"rank{rank}.safetensors")["output"] for rank in range(num_ranks)]
        assert all(output.shape == wanted.shape for output in outputs)
        difference = max(float((output.float() - wanted.float()).abs().max()) for output in outputs)
        return difference, told[0]

    return run
