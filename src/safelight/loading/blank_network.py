"""A network of the diffusers package as it is loaded, of zeros: compiling looks at it in the place of the real one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from safelight.acceleration.activations import META
from safelight.acceleration.blocks import repeated_blocks
from safelight.backends import components
from safelight.core.server_args import ServerArgs
from safelight.loading.bounds import bounded
from safelight.loading.components import in_words, quiet
from safelight.loading.repository import Repository


def blank_network(
    server_args: ServerArgs, repository: Repository, component: str, dtypes: Mapping[str, str]
) -> nn.Module:
    """Return a network as it is loaded, of zeros. Blocks whose weights look alike have the same zeros.

    Args:
        server_args: of the device.
        repository: the model.
        component: a class of the package.
        dtypes: of its parameters and buffers, by name.

    """
    folder, device = repository.folder(component), server_args.torch_device()
    cls: Any = components.check_component(folder, component, repository.index[component])
    with in_words(f"{component}: {cls.__name__}"), quiet(), EmptyOnMeta(), bounded(component):
        module: nn.Module = cls.from_config(cls.load_config(folder, local_files_only=True))
    shared: dict[Hashable, nn.Parameter] = {}
    owners = [("", module)] + [(type(block).__name__, block) for block in repeated_blocks(module)]
    kept = {id(parameter): dtypes[name] for name, parameter in module.named_parameters()}
    for kind, owner in reversed(owners):  # what is in no block is left for the last
        for name, tensor in list(owner.named_parameters()):
            if tensor.is_meta:
                form = (kind, name, tensor.shape)
                if form not in shared:
                    dtype = vars(torch)[kept[id(tensor)]]
                    shared[form] = nn.Parameter(torch.zeros(tensor.shape, dtype=dtype, device=device))
                path, _, own = name.rpartition(".")
                owner.get_submodule(path).register_parameter(own, shared[form])
    for name, each in (*module.named_parameters(), *module.named_buffers()):
        each.data = each.data.to(device, vars(torch)[dtypes[name]])
    return module.eval()  # parameters that ask for gradients, as the package leaves them: products depend on it


class EmptyOnMeta(TorchFunctionMode):
    """Makes what is not filled, as weights are before they are read, on the meta device; all else has its values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make it."""
        given = dict(kwargs or {})
        if func is torch.empty:
            given["device"] = META
        return func(*args, **given)
