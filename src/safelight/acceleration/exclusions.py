"""Settings that exclude each other: refused at start, before a model is loaded, with the reason."""

from __future__ import annotations

from collections.abc import Mapping

from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError

WITH_SEVERAL_DEVICES: Mapping[str, str] = {
    "offload": "what lies where is planned for one device's memory",
    "compile": "ranks would have the compiled form at different times",
    "cuda_graphs": "graphs do not capture what ranks send each other",
    "vae_tiling": "vae_parallel decodes in bands, one a rank",
}
"""What one device alone can have: settings of `ServerArgs` that have to be `none` otherwise, and why."""

WITH_OFFLOAD: Mapping[str, str] = {"cuda_graphs": "a graph holds the weights' addresses"}
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


def _refuse(server_args: ServerArgs, reasons: Mapping[str, str], beside: str) -> None:
    for setting, reason in reasons.items():
        got = vars(server_args)[setting]
        if got != "none":
            raise InvalidParameterError(setting, got, f"none with {beside}: {reason}")
