"""Settings that exclude each other: refused at start, before a model is loaded, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError


@dataclass(frozen=True)
class Exclusion:
    """A setting that cannot be had beside something else.

    Attributes:
        setting: its name in `ServerArgs`.
        value: what it has to be then.
        reason: why.

    """

    setting: str
    value: str
    reason: str


WITH_SEVERAL_DEVICES = (
    Exclusion("offload", "none", "what lies where is planned for one device's memory"),
    Exclusion("compile", "none", "ranks would have the compiled form at different times"),
    Exclusion("cuda_graphs", "none", "graphs do not capture what ranks send each other"),
    Exclusion("vae_tiling", "none", "vae_parallel decodes in bands, one a rank"),
)
"""What one device alone can have."""

WITH_OFFLOAD = (Exclusion("cuda_graphs", "none", "a graph holds the weights' addresses"),)
"""What cannot be had where weights change their place."""


def refuse_excluded(server_args: ServerArgs) -> None:
    """Refuse settings that exclude each other.

    Raises:
        InvalidParameterError: naming one of them, what else is set, and why.

    """
    num_devices = server_args.num_devices()
    if num_devices > 1:
        _refuse(server_args, WITH_SEVERAL_DEVICES, f"{num_devices} devices for a request")
    elif server_args.vae_parallel:
        raise InvalidParameterError("vae_parallel", True, "false with one device: bands are decoded one a device")
    if server_args.offload != "none":
        _refuse(server_args, WITH_OFFLOAD, f"offload={server_args.offload}")


def _refuse(server_args: ServerArgs, exclusions: tuple[Exclusion, ...], beside: str) -> None:
    for each in exclusions:
        got = vars(server_args)[each.setting]
        if got != each.value:
            raise InvalidParameterError(each.setting, got, f"{each.value} with {beside}: {each.reason}")
