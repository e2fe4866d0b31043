"""How the libraries' VAEs are run: for each class, what our ways of running it are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from safelight.acceleration.tiled_vae import BandPlan, decode_in_bands
from safelight.errors import InvalidParameterError
from safelight.layers.causal_vae import CausalDecoder
from safelight.parallel.collectives import Communicator
from safelight.parallel.vae import BandedCausalDecoder, RowBands, decode_at_once, divide_decoder
from safelight.stages.causal_vae import CausalFrameDecoder, CausalFrameEncoder
from safelight.stages.vae import VAE, whole


@dataclass(frozen=True)
class Treatment:
    """The ways of running a VAE of one class; its decoder in bands is `decode_in_bands`.

    Attributes:
        plain: on one device.
        over_ranks: each rank decodes some rows; None where that cannot be.

    """

    plain: Callable[[Any], VAE] = whole
    over_ranks: Callable[[Any, Communicator], VAE] | None = None


def by_frames(vae: Any, decoder: CausalDecoder | None = None) -> VAE:
    """Encode and decode one latent frame after the other."""
    return VAE(CausalFrameEncoder(vae), CausalFrameDecoder(decoder or CausalDecoder(vae)))


def by_frames_over_ranks(vae: Any, ranks: Communicator) -> VAE:
    """Decode some rows of one latent frame after the other."""
    return by_frames(vae, BandedCausalDecoder(vae, ranks))


def layers_over_ranks(vae: Any, ranks: Communicator) -> VAE:
    """Decode some rows, layer by layer."""
    divide_decoder(vae.decoder, RowBands(ranks))
    return whole(vae)


def frames_at_once_over_ranks(vae: Any, ranks: Communicator) -> VAE:
    """Decode some rows of all frames."""
    return replace(whole(vae), decode=partial(decode_at_once, BandedCausalDecoder(vae, ranks)))


TREATMENTS: Mapping[str, Treatment] = {
    "AutoencoderKL": Treatment(over_ranks=layers_over_ranks),
    "AutoencoderKLQwenImage": Treatment(over_ranks=frames_at_once_over_ranks),
    "AutoencoderKLWan": Treatment(by_frames, by_frames_over_ranks),
}
"""By the class of the library. Another class is run as the library runs it."""


def can_divide(class_name: str) -> bool:
    """Say whether ranks can share the rows of what a VAE decodes."""
    return TREATMENTS.get(class_name, Treatment()).over_ranks is not None


def run_vae(vae: Any, *, bands: BandPlan | None = None, ranks: Communicator | None = None) -> VAE:
    """Return how a VAE is run.

    Args:
        vae: the library's module; over ranks, its decoder is changed in place.
        bands: how it is divided into bands of rows; None leaves it whole.
        ranks: among which rows are divided; None for one.

    Raises:
        InvalidParameterError: if this VAE cannot be run so.

    """
    name = type(vae).__name__
    treatment = TREATMENTS.get(name, Treatment())
    if ranks is not None and ranks.size > 1:
        if treatment.over_ranks is None:
            raise InvalidParameterError("vae_parallel", True, f"false: the decoder of {name} cannot be divided")
        return treatment.over_ranks(vae, ranks)
    plain = treatment.plain(vae)
    if bands is None:
        return plain
    return replace(plain, decoder=decode_in_bands(vae, bands), decode=None, unit_cost=bands.unit_cost)
