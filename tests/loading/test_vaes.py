"""How a library's VAE is run: one row a class, and a refusal by name for what it has not."""

from __future__ import annotations

import pytest
from diffusers import AutoencoderTiny

from safelight.acceleration.tiled_vae import BandPlan
from safelight.errors import InvalidParameterError
from safelight.loading.vaes import TREATMENTS, can_divide, run_vae
from safelight.parallel.collectives import Communicator
from safelight.stages.causal_vae import CausalFrameDecoder, CausalFrameEncoder
from tests.acceleration.vaes import KINDS, small

FRAMES = ("Wan 2.1", "Wan 2.2")


@pytest.mark.parametrize("kind", KINDS)
def test_each_class_is_run_in_its_way(kind):
    vae = small(kind)
    run = run_vae(vae)
    assert (type(run.encoder) is CausalFrameEncoder) == (kind in FRAMES) == (type(run.decoder) is CausalFrameDecoder)
    assert (run.decode is None) == (run.decoder is not None)
    bands = run_vae(vae, bands=BandPlan(24, 5))
    assert type(bands.decoder).__name__.endswith("BandDecoder") and bands.unit_cost == 5
    assert type(bands.encoder) is type(run.encoder)
    assert can_divide(type(vae).__name__)


def test_another_class_is_run_as_its_library_runs_it():
    vae = AutoencoderTiny()
    assert type(vae).__name__ not in TREATMENTS
    run = run_vae(vae)
    assert run.encoder is None and run.encode is not None and run.decoder is None
    with pytest.raises(InvalidParameterError, match=r"vae_tiling.*AutoencoderTiny"):
        run_vae(vae, bands=BandPlan())
    two = Communicator("world")
    two.size = 2
    with pytest.raises(InvalidParameterError, match=r"vae_parallel.*AutoencoderTiny"):
        run_vae(vae, ranks=two)
