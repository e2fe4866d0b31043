"""How the libraries' VAEs are run: for each class, what our ways of running it are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from safelight.acceleration.causal_bands import CausalBandDecoder
from safelight.acceleration.cpu import PLAIN, CpuPlan
from safelight.acceleration.cpu_vae import accelerate_vae
from safelight.acceleration.group_norm_bands import GroupNormBandDecoder
from safelight.errors import InvalidParameterError
from safelight.layers.causal_vae import CausalDecoder
from safelight.parallel.collectives import Communicator
from safelight.parallel.vae import BandedCausalDecoder, RowBands, decode_at_once, divide_decoder
from safelight.stages.causal_vae import CausalFrameDecoder, CausalFrameEncoder
from safelight.stages.vae import VAE, Decoder, whole


@dataclass(frozen=True)
class Treatment:
    """The ways of running a VAE of one class.

    Attributes:
        plain: on one device.
        on_cpu: has what it is made of computed faster there, by the processor's plan; None leaves it as it is.
        bands: decodes in bands of rows on one device, where it knows all that the VAE has.
        over_ranks: each rank decodes some rows; None where that cannot be.

    """

    plain: Callable[[Any], VAE] = whole
    on_cpu: Callable[[Any, CpuPlan], None] | None = None
    bands: type[CausalBandDecoder | GroupNormBandDecoder] = CausalBandDecoder
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
    "AutoencoderKL": Treatment(on_cpu=accelerate_vae, bands=GroupNormBandDecoder, over_ranks=layers_over_ranks),
    "AutoencoderKLQwenImage": Treatment(over_ranks=frames_at_once_over_ranks),
    "AutoencoderKLWan": Treatment(by_frames, over_ranks=by_frames_over_ranks),
}
"""By the class of the library. Another class is run as the library runs it."""


def treatment_of(class_name: str) -> Treatment:
    """Return how a VAE of a class is run."""
    return TREATMENTS.get(class_name, Treatment())


def can_divide(class_name: str) -> bool:
    """Say whether ranks can share the rows of what a VAE decodes."""
    return treatment_of(class_name).over_ranks is not None


def decode_in_bands(vae: Any, rows: int | None = None) -> Decoder:
    """Return the decoder in bands of a VAE: the pixels of the undivided decode in less than half the memory.

    The libraries' own tiling normalises each tile by itself and blends the seams, which changes the picture.

    Args:
        vae: the library's module, loaded or on the meta device. The memory of its decoder's weights is rearranged,
            their values stay.
        rows: of the picture, that a band has at most; None leaves it to the decoder. Fewer take less memory; where
            halos are decoded twice they take more time.

    Raises:
        InvalidParameterError: if this kind of VAE cannot be decoded in bands, with the reason.

    """
    bands = treatment_of(type(vae).__name__).bands
    reason = bands.why_not(vae)
    if reason is not None:
        raise InvalidParameterError("vae_tiling", "exact", f"none with {type(vae).__name__}: {reason}")
    return bands(vae, rows)


def run_vae(vae: Any, *, in_bands: bool = False, ranks: Communicator | None = None, cpu_plan: CpuPlan = PLAIN) -> VAE:
    """Return how a VAE is run.

    Args:
        vae: the library's module; over ranks, its decoder is changed in place, and so is what the plan routes.
        in_bands: whether one device decodes in bands of rows.
        ranks: among which rows are divided; None for one.
        cpu_plan: of the processor, where it is not divided.

    Raises:
        InvalidParameterError: if this VAE cannot be run so.

    """
    treatment = treatment_of(type(vae).__name__)
    if ranks is not None and ranks.size > 1:
        if treatment.over_ranks is None:
            takes = f"false: the decoder of {type(vae).__name__} cannot be divided"
            raise InvalidParameterError("vae_parallel", True, takes)
        return treatment.over_ranks(vae, ranks)
    if in_bands:
        return replace(treatment.plain(vae), decoder=decode_in_bands(vae), decode=None)
    if treatment.on_cpu is not None:
        treatment.on_cpu(vae, cpu_plan)
    return treatment.plain(vae)


def package_vae(networks: Mapping[str, Any], in_bands: bool) -> VAE | None:
    """Return how the VAE of a pipeline of the package is run; None for the package's own way.

    Args:
        networks: of the pipeline, by name.
        in_bands: whether it decodes in bands of rows.

    Raises:
        InvalidParameterError: if it has none that can.

    """
    if not in_bands:
        return None
    if "vae" not in networks:
        raise InvalidParameterError("vae_tiling", "exact", "none with this model, which has no VAE")
    return run_vae(networks["vae"], in_bands=True)
