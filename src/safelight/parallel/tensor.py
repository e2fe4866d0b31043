"""Tensor parallelism (Shoeybi et al., 2019, arXiv:1909.08053): each rank has a part of each weight.

A model's plan is a table, `_tp_plan` of its class: patterns of module names to styles.

| style | weight | result |
|---|---|---|
| `column` | divided by outputs | this rank's channels; attention heads are divided so |
| `column, gathered` | divided by outputs | every channel: the weight is divided for memory alone |
| `row` | divided by inputs | the sum over ranks; the bias is in it once |
| `norm` | divided by channels | an RMS norm over the channels of all ranks |
| `rotary` | none | queries and keys normed over the heads of all ranks, and turned |

`of 1:4` behind `column` or `row` names parts, in proportion, that are divided each by itself: queries, keys and values
of one weight are `column of 1:1:1`. What is not in the table is whole on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safelight.attention import Attention
from safelight.errors import InvalidParameterError
from safelight.layers.rotary import QKNormRotary, apply_rotary_emb
from safelight.parallel.collectives import Communicator
from safelight.parallel.plans import matching, tensor_plan
from safelight.parallel.shards import Shard, divided

STYLE = re.compile(r"(?P<kind>column|row|norm|rotary)(?: of (?P<parts>\d+(?::\d+)+))?(?P<gathered>, gathered)?")


@dataclass(frozen=True)
class Style:
    """One entry of a plan.

    Attributes:
        kind: `column`, `row`, `norm` or `rotary`.
        parts: of the divided dimension, in proportion.
        gathered: whether the results of all ranks are put together.

    """

    kind: str
    parts: tuple[int, ...]
    gathered: bool


def parse_style(stated: Any) -> Style:
    """Return an entry of a plan, given its words.

    Raises:
        ValueError: for a style that there is not.

    """
    found = STYLE.fullmatch(stated) if isinstance(stated, str) else None
    if found is None:
        raise ValueError(f"{stated!r} is no style of a tensor-parallel plan")
    parts = tuple(int(part) for part in (found["parts"] or "1").split(":"))
    style = Style(found["kind"], parts, found["gathered"] is not None)
    if style.gathered and (style.kind != "column" or len(parts) > 1):
        raise ValueError(f"{stated!r}: only the one part of a column style can be gathered")
    return style


def shard_parameters(
    module: nn.Module, rank: int, size: int, plan: Mapping[str, Any] | None = None
) -> dict[str, Shard]:
    """Make a model's parameters this rank's shards; return them by name.

    On the meta device, before the weights are loaded, this costs nothing, and the result tells the loader what to read.
    On a loaded model it cuts the shards out of what is there.

    Args:
        module: changed in place.
        rank: of `size`, along the axis `tp`.
        size: number of ranks.
        plan: the model's own unless given.

    Raises:
        InvalidParameterError: if the model has no plan, or something does not divide.

    """
    shards: dict[str, Shard] = {}
    if size == 1:
        return shards
    planned = list(_planned(module, plan, size))
    _share_heads(module, size)
    for name, submodule, style in planned:
        for kind, parameter in list(submodule.named_parameters(recurse=False)):
            shard = _shard(style, kind, tuple(parameter.shape), rank, size)
            if shard is None:
                length = parameter.shape[1 if style.kind == "row" and kind == "weight" else 0]
                raise InvalidParameterError("tp_size", size, f"a divisor of the {length} channels of {name}")
            kept = shard.read(parameter.detach()) if shard.pieces else torch.zeros_like(parameter)
            submodule.register_parameter(kind, nn.Parameter(kept.clone(), requires_grad=False))
            shards[f"{name}.{kind}"] = shard
        if isinstance(submodule, nn.Linear):
            submodule.out_features, submodule.in_features = submodule.weight.shape
    return shards


def _share_heads(module: nn.Module, size: int) -> None:
    """Tell the attention layers how many heads are here; refuse heads that do not divide."""
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, Attention)]
    for name, layer in layers:
        if layer.num_kv_heads % size:
            raise InvalidParameterError("tp_size", size, f"a divisor of the {layer.num_kv_heads} heads of {name}")
    for _, layer in layers:
        layer.num_heads, layer.num_kv_heads = layer.num_heads // size, layer.num_kv_heads // size


def connect_shards(module: nn.Module, ranks: Communicator, plan: Mapping[str, Any] | None = None) -> None:
    """Let the modules whose parameters are divided sum and gather over ranks.

    It comes after whatever replaces modules, such as quantisation.

    Args:
        module: after `shard_parameters`, with its weights.
        ranks: along the axis `tp`.
        plan: the model's own unless given.

    """
    if ranks.size == 1:
        return
    for name, submodule, style in _planned(module, plan, ranks.size):
        if style.kind == "norm":
            assert isinstance(submodule, nn.RMSNorm), f"{name} is no RMS norm"
            module.set_submodule(name, RMSNormOverRanks(submodule, ranks))
        elif style.kind == "rotary":
            assert isinstance(submodule, QKNormRotary), f"{name} does not norm and turn"
            submodule.operation = partial(qk_norm_rotary_over_ranks, ranks)
        elif style.kind == "row":
            submodule.register_forward_hook(lambda _module, _args, partial: ranks.all_reduce(partial))
        elif style.gathered:
            submodule.register_forward_hook(lambda _module, _args, own: ranks.all_gather(own, dim=-1))


class RMSNormOverRanks(nn.Module):
    """An RMS norm over channels that lie on several ranks: squares are summed over all of them.

    Args:
        norm: over all channels, with this rank's part of the weight.
        ranks: that have the others.

    """

    def __init__(self, norm: nn.RMSNorm, ranks: Communicator) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.eps
        self.ranks = ranks

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [..., C] of this rank's channels, C of C * ranks; computed in float32."""
        eps = torch.finfo(hidden_states.dtype).eps if self.eps is None else self.eps
        return rms_norm_over_ranks(self.ranks, hidden_states, self.weight, eps)


def rms_norm_over_ranks(ranks: Communicator, hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the norm of [..., C] over the channels of all ranks, C of C * ranks; computed in float32."""
    exact, channels = hidden_states.float(), hidden_states.shape[-1] * ranks.size
    squares = ranks.all_reduce(exact.square().sum(-1, keepdim=True))
    return (exact * torch.rsqrt(squares / channels + eps) * weight).to(hidden_states.dtype)


def qk_norm_rotary_over_ranks(
    ranks: Communicator,
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    freqs_cis: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return query and key of this rank's heads, normed over those of all and then turned; as `qk_norm_rotary`."""
    normed = (
        rms_norm_over_ranks(ranks, states.flatten(2), weight, eps).view(states.shape)
        for states, weight in ((query, query_weight), (key, key_weight))
    )
    turned_query, turned_key = (apply_rotary_emb(states, freqs_cis) for states in normed)
    return turned_query, turned_key


LIBRARY_STYLES = {
    "colwise": "column",
    "rowwise": "row",
    "colwise_gather_output": "column, gathered",
    "replicated_with_grad_allreduce": None,
}
"""Styles of transformers' plans in our words; None leaves the weight whole."""


def library_plan(module: nn.Module, size: int) -> dict[str, str] | None:
    """Return the plan that transformers states for the layers of one of its models, in our words.

    None where it states none, or one that so many ranks cannot follow: such a model runs on one rank.

    Args:
        module: the library's, a language model or one that has one inside.
        size: number of ranks.

    """
    found: dict[str, str] = {}
    for name, submodule in module.named_modules():
        config = vars(submodule).get("config")
        stated = None if config is None else vars(type(config)).get("base_model_tp_plan")
        if not stated or not any(any(matching(submodule, pattern)) for pattern in stated):
            continue
        if config.num_key_value_heads % size or not set(stated.values()) <= LIBRARY_STYLES.keys():
            return None
        prefix = f"{name}." if name else ""
        found |= {prefix + pattern: style for pattern, words in stated.items() if (style := LIBRARY_STYLES[words])}
    return found or None


def _planned(module: nn.Module, plan: Mapping[str, Any] | None, size: int) -> Iterator[tuple[str, nn.Module, Style]]:
    """Yield the modules of a plan with their names and styles."""
    stated = tensor_plan(module) if plan is None else plan
    if stated is None:
        raise InvalidParameterError("tp_size", size, f"1: {type(module).__name__} has no tensor-parallel plan")
    for pattern, words in stated.items():
        for name, submodule in list(matching(module, pattern)):
            yield name, submodule, parse_style(words)


def _shard(style: Style, kind: str, shape: tuple[int, ...], rank: int, size: int) -> Shard | None:
    """Return this rank's shard of a parameter, `weight` or `bias`; None if it does not divide."""
    if style.kind == "row" and kind == "bias":  # the first rank brings it into the sum
        return Shard(shape, 0, ((0, shape[0]),) if rank == 0 else ())
    return divided(shape, 1 if style.kind == "row" else 0, style.parts, rank, size)
