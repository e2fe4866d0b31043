"""How a library's VAE is run: one row a class, and a refusal by name for what it has not."""

from __future__ import annotations

import pytest
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, AutoencoderKLWan, AutoencoderTiny

from safelight.acceleration.cpu_vae import InPlaceResidual, WinogradConv2d
from safelight.errors import InvalidParameterError
from safelight.loading.vaes import TREATMENTS, can_divide, decode_in_bands, run_vae
from safelight.parallel.collectives import Communicator
from safelight.stages.causal_vae import CausalFrameDecoder, CausalFrameEncoder
from tests.acceleration.processors import EVERYTHING
from tests.acceleration.vaes import KINDS, group_norm_options, picture_vae, small

ATTENTION = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
FRAMES = ("Wan 2.1", "Wan 2.2")


@pytest.mark.parametrize("kind", KINDS)
def test_each_class_is_run_in_its_way(kind):
    vae = small(kind)
    run = run_vae(vae)
    assert (type(run.encoder) is CausalFrameEncoder) == (kind in FRAMES) == (type(run.decoder) is CausalFrameDecoder)
    assert (run.decode is None) == (run.decoder is not None)
    bands = run_vae(vae, in_bands=True)
    assert type(bands.decoder).__name__.endswith("BandDecoder") and bands.decode is None
    assert type(bands.encoder) is type(run.encoder)
    assert can_divide(type(vae).__name__)


def test_another_class_is_run_as_its_library_runs_it():
    vae = AutoencoderTiny()
    assert type(vae).__name__ not in TREATMENTS
    run = run_vae(vae)
    assert run.encoder is None and run.encode is not None and run.decoder is None
    with pytest.raises(InvalidParameterError, match=r"vae_tiling.*AutoencoderTiny"):
        run_vae(vae, in_bands=True)
    two = Communicator("world")
    two.size = 2
    with pytest.raises(InvalidParameterError, match=r"vae_parallel.*AutoencoderTiny"):
        run_vae(vae, ranks=two)


def test_the_cpus_routes_are_a_part_of_the_row():
    """A picture VAE that is whole takes them; one in bands, whose decoder walks the library's modules, does not."""
    for in_bands, is_routed in ((False, True), (True, False)):
        vae = picture_vae(0)
        run_vae(vae, in_bands=in_bands, cpu_plan=EVERYTHING)
        classes = {type(module) for module in vae.modules()}
        assert (WinogradConv2d in classes) is (InPlaceResidual in classes) is is_routed
    for kind in FRAMES:
        vae = small(kind)
        before = {type(module) for module in vae.modules()}
        run_vae(vae, cpu_plan=EVERYTHING)
        assert {type(module) for module in vae.modules()} == before


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: AutoencoderTiny(), "AutoencoderTiny"),
        (lambda: AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), norm_num_groups=4), "HunyuanVideo"),
        (lambda: AutoencoderKL(**{**group_norm_options(8, 16), "up_block_types": ATTENTION}), "AttnUpDecoderBlock2D"),
        (lambda: AutoencoderKL(**group_norm_options(8, 16, act_fn="gelu")), "gelu"),
        (lambda: AutoencoderKLWan(base_dim=4, attn_scales=[1.0]), None),
    ],
    ids=["tiny", "another causal", "attention in a block", "another activation", "attention scales"],
)
def test_what_cannot_be_divided_is_refused_with_the_reason(make, reason):
    vae = make()
    if reason is None:
        decode_in_bands(vae)  # these attentions are in the encoder alone
        return
    with pytest.raises(InvalidParameterError, match=f"vae_tiling.*{reason}"):
        decode_in_bands(vae)
