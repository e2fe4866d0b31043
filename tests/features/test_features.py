"""Each pair of features works within its bound, or is refused at start; no setting does nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight import ServerArgs
from safelight.errors import InvalidParameterError
from safelight.loading.loader import load_pipeline
from safelight.loading.planning import layout_for
from tests.acceleration.memories import HostMemory
from tests.features import runs
from tests.features.table import FEATURES, OFF, PAIRS, REFUSED, REFUSED_PAIRS, WORKING_PAIRS

PAGE = Path(__file__).parents[2] / "docs" / "features.md"
QUICK_FAMILY, QUICK_LAYOUT, VAE = "FluxPipeline", "Ulysses", "VAE parallel"


def is_slow(name, pair):
    """Say whether a pair in a family runs in `make test-all` only.

    Quick are each feature of one device alone in every family, each pair of them in one family in turn, and one layout
    in one family. Compiling takes long.
    """
    if "compile" in pair.names:
        return True
    if pair.num_ranks > 1:
        return name != QUICK_FAMILY or pair.num_ranks > 2 or QUICK_LAYOUT not in pair.names or VAE in pair.names
    families = list(runs.ASKED)
    return pair.one is not pair.other and families[WORKING_PAIRS.index(pair) % len(families)] != name


def marks_of(name, pair):
    """Return a case's marks."""
    return [pytest.mark.slow] * is_slow(name, pair) + [pytest.mark.cuda] * pair.needs_cuda


def cases(is_chosen):
    """Return each pair that works, of those chosen, in each family."""
    return [
        pytest.param(name, pair, id=f"{name}: {pair}", marks=marks_of(name, pair))
        for name in runs.ASKED
        for pair in WORKING_PAIRS
        if is_chosen(pair)
    ]


def check(name, pair, difference, measured):
    """Hold a difference against the bound, and keep it for the page."""
    measured[str(pair), name] = max(difference, measured.get((str(pair), name), 0.0))
    assert difference <= pair.bound


def on_cuda(folder, name):
    """Return what a pipeline makes with everything off, on CUDA."""
    args = ServerArgs(str(folder), device="cuda", dtype="float32", **OFF)
    return runs.run(load_pipeline(args), name, "alone").outputs


def check_on_one(name, pair, folder_of, pictures_of, measured):
    """Hold a pair on one device against everything off."""
    if pair.needs_cuda and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    pipeline = runs.load(folder_of(name), pair)
    wanted = pictures_of(name) if pipeline.device.type == "cpu" else on_cuda(folder_of(name), name)
    seen = runs.run(pipeline, name, pair.driver)
    assert runs.not_in_effect(pair, pipeline, seen) == []
    check(name, pair, runs.largest_difference(seen.outputs, wanted), measured)


@pytest.mark.parametrize(("name", "pair"), cases(lambda pair: pair.num_ranks == 1 and "compile" not in pair.names))
def test_a_pair_on_one_device(name, pair, folder_of, pictures_of, measured):
    check_on_one(name, pair, folder_of, pictures_of, measured)


@pytest.mark.parametrize(("name", "pair"), cases(lambda pair: pair.num_ranks > 1))
def test_a_pair_on_ranks(name, pair, folder_of, pictures_of, pools, measured, tmp_path):
    both = {"one": pair.one.name, "other": pair.other.name}
    told = pools(pair.num_ranks).run("pair_on_ranks", folder=str(folder_of(name)), name=name, **both, out=str(tmp_path))
    assert told == [[]] * pair.num_ranks
    for rank in range(pair.num_ranks):
        made = load_file(tmp_path / f"rank{rank}.safetensors")
        outputs = [made[f"r{index}"] for index in range(len(made))]
        check(name, pair, runs.largest_difference(outputs, pictures_of(name)), measured)


@pytest.mark.parametrize("pair", REFUSED_PAIRS, ids=str)
@pytest.mark.parametrize("name", runs.ASKED)
def test_a_pair_is_refused_at_start(name, pair, folder_of):
    """Before anything is loaded, and before a layout is chosen, where there are ranks."""
    args = ServerArgs(str(folder_of(name)), device="cpu", **pair.settings)
    message = f"^{pair.refusal.setting}: .*{re.escape(pair.refusal.reason)}$"
    assert any(pair.refusal.setting in feature.settings for feature in (pair.one, pair.other))
    with pytest.raises(InvalidParameterError, match=message):
        load_pipeline(args, HostMemory())
    if pair.num_ranks > 1:
        with pytest.raises(InvalidParameterError, match=message):
            layout_for(args)


def test_bands_on_one_device_alone_are_refused():
    with pytest.raises(InvalidParameterError, match="vae_parallel: got True; it takes false with one device"):
        load_pipeline(ServerArgs(device="cpu", vae_parallel=True))


def test_every_refusal_is_of_two_features():
    assert set(REFUSED) == {pair.names for pair in REFUSED_PAIRS}


def test_the_page_has_every_pair():
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    names = [feature.name for feature in FEATURES]
    assert [cell.strip(" |") for cell in rows[0][1:]] == names
    table = [[cell.strip(" |") for cell in row] for row in rows[1 : 1 + len(FEATURES) + 1] if "---" not in row[0]]
    assert [row[0] for row in table[: len(names)]] == names
    for index, row in enumerate(table[: len(names)]):
        assert all(row[1 : index + 2]), row
    refused = sum(cell.startswith("refused") for row in table[: len(names)] for cell in row)
    assert refused == len(REFUSED) and len(PAIRS) == len(names) * (len(names) + 1) / 2 - 1


@pytest.mark.parametrize(("name", "pair"), cases(lambda pair: "compile" in pair.names))
def test_a_pair_with_compile(name, pair, folder_of, pictures_of, measured):
    check_on_one(name, pair, folder_of, pictures_of, measured)
