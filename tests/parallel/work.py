"""What the ranks of a pool do, by name; arguments and results are JSON, tensors are files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from benchmarks import parallel
from benchmarks.stacks import STACKS, Size
from safelight import ServerArgs
from safelight.attention import Attention, AttentionMetadata
from safelight.core.calls import CallKey, ModelCall
from safelight.core.executor import Execution, SyncExecutor
from safelight.core.model_runner import Forward, ModelRunner
from safelight.core.pipeline import ComposedPipeline
from safelight.core.registry import resolve_class
from safelight.core.request import Prediction, Req
from safelight.errors import InvalidParameterError, RankFailedError
from safelight.layers.causal_vae import FeatureCache
from safelight.loading.checkpoint import load_weights
from safelight.loading.files import read_json
from safelight.loading.loader import load_pipeline
from safelight.loading.vaes import run_vae
from safelight.parallel.attention import SequenceParallelAttention, TokenLayout
from safelight.parallel.calls import CallsOverRanks, Sharing
from safelight.parallel.calls import divide as divide_calls
from safelight.parallel.collectives import Communicator
from safelight.parallel.layout import AXES, ParallelLayout
from safelight.parallel.mesh import Mesh, build_mesh, lone_mesh
from safelight.parallel.sequence import apply_sequence_parallel, piece_of
from safelight.parallel.tensor import connect_shards, library_plan, shard_parameters
from safelight.parallel.vae import BandedCausalDecoder, RowBands, divide_decoder
from safelight.runtime.worker.stacking import Stacking
from safelight.testing.models import requests
from safelight.testing.recipes import shake
from tests.calls import loaded_as
from tests.features.runs import pair_on_ranks  # noqa: F401 - run by its name
from tests.recipes import all_recipes
from tests.recipes.wan import vae as wan_vae

TIMEOUT = timedelta(seconds=30)


@cache
def mesh(cfg: int = 1, ring: int = 1, ulysses: int = 1, tp: int = 1, vae: bool = False) -> Mesh:
    """Return the mesh of a layout over all ranks of the pool."""
    return build_mesh(ParallelLayout(cfg, ring, ulysses, tp, vae), TIMEOUT)


@cache
def pipeline(folder: str, divided_vae: bool = False) -> ComposedPipeline:
    """Return the pipeline of a checkpoint; one whose VAE is divided is loaded apart."""
    return load_pipeline(ServerArgs(folder, device="cpu", kernels="plain"))


@cache
def divided_vae(folder: str, ranks: Mesh) -> ComposedPipeline:
    """Return the pipeline of a checkpoint with its VAE divided."""
    loaded = pipeline(folder, divided_vae=True)
    return loaded_as(loaded, vae=run_vae(loaded.get_module("vae"), ranks=ranks.world))


def load_transformer(
    loaded: ComposedPipeline, folder: Path, ranks: Mesh, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """Load a transformer for this rank, as the loader does."""
    config = read_json(folder / "config.json")
    cls: Any = resolve_class(type(loaded).component_classes[config["_class_name"]])
    with torch.device("meta"):
        module: torch.nn.Module = cls.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    shards = shard_parameters(module, ranks.tp.rank, ranks.tp.size)
    load_weights(module, folder, dtype, torch.device("cpu"), shards)
    connect_shards(module, ranks.tp)
    apply_sequence_parallel(module, ranks)
    return module.eval()


def divide(folder: str, ranks: Mesh) -> ComposedPipeline:
    """Return the pipeline of a checkpoint with its transformers divided afresh."""
    loaded = divided_vae(folder, ranks) if ranks.layout.vae else pipeline(folder)
    modules: Any = loaded.components.modules
    for name in loaded.modules():
        if name.startswith("transformer"):
            modules[name] = load_transformer(loaded, Path(folder) / name, ranks)
    return loaded


def request(loaded: ComposedPipeline, recipe: str, case: str, output_type: str, **fields: Any) -> Req:
    """Return the first output of a recipe's case."""
    (found,) = [entry for entry in all_recipes()[recipe].cases if entry.name == case]
    req: Req = requests(loaded, {**found.fields, "output_type": output_type, **fields})[0]
    return req


def finish(executor: SyncExecutor, req: Req) -> torch.Tensor:
    """Drive a request to its end; return its output."""
    for _ in executor.execute(req):
        pass
    output: torch.Tensor = req.outputs[0]
    return output.contiguous()


def alone(folder: str, recipe: str, case: str, output_type: str = "latent") -> torch.Tensor:
    """Return what one rank makes of a case."""
    with patched(recipe):
        loaded = pipeline(folder)
        return finish(SyncExecutor(loaded), request(loaded, recipe, case, output_type))


def together(
    folder: str, recipe: str, case: str, layout: dict[str, Any], out: str, output_type: str = "latent"
) -> dict[str, Any]:
    """Write what all ranks make of a case; return what was sent on each axis, and the calls of each step."""
    ranks, steps = mesh(**layout), []
    with patched(recipe):
        loaded = divide(folder, ranks)
        req = request(loaded, recipe, case, output_type)
        before = {axis: (t.num_calls, t.num_bytes) for axis, t in ranks.traffic().items()}
        runner = ModelRunner(loaded, [CallsOverRanks({}, ranks.cfg, ranks.world, torch.device("cpu"))])
        for _ in SyncExecutor(loaded, runner).execute(req):
            if req.in_loop:
                steps.append([described(call) for call in req.pending])
    save_file({"output": req.outputs[0].contiguous()}, str(Path(out) / f"rank{ranks.world.rank}.safetensors"))
    sent = {axis: (t.num_calls - before[axis][0], t.num_bytes - before[axis][1]) for axis, t in ranks.traffic().items()}
    return {"sent": {axis: counts for axis, counts in sent.items() if counts[0]}, "steps": steps}


def described(call: ModelCall) -> dict[str, list[int]]:
    """Return the shapes of a call's arguments."""
    return {name: list(value.shape) for name, value in {**call.kwargs, **call.shared_kwargs}.items()}


def patched(recipe: str) -> Any:
    """Return a context in which the recipe's patch holds."""
    return _Patched(recipe)


class _Patched:
    def __init__(self, recipe: str) -> None:
        self.patch, self.monkeypatch = all_recipes()[recipe].patch, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        if self.patch is not None:
            self.patch(self.monkeypatch)

    def __exit__(self, *error: object) -> None:
        self.monkeypatch.undo()


def messages(length: int) -> dict[str, Any]:
    """Send a message of so many bytes, and some tensors, from rank 1 to all; return what arrived."""
    world = mesh(tp=size()).world
    content = bytes(i % 251 for i in range(length))
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor([True, False]), torch.ones(0, 4, dtype=torch.bfloat16)]
    sender = world.rank == 1
    message = world.broadcast_bytes(content if sender else None, source=1)
    arrived = world.broadcast_tensors(tensors if sender else None, "cpu", source=1)
    same = all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(arrived, tensors, strict=True))
    return {"message": message == content, "tensors": same}


def votes() -> list[bool]:
    """Vote well, and then with one rank against."""
    control = mesh(tp=size()).control
    return [control.agree(True), control.agree(control.rank != 1)]


def size() -> int:
    """Return the number of ranks of the pool."""
    return torch.distributed.get_world_size()


def lonely_wait(seconds: float) -> str:
    """Rank 0 waits for a partner that does not come; return what that ended with."""
    ranks = torch.distributed.new_group(list(range(size())), timeout=timedelta(seconds=seconds))
    if torch.distributed.get_rank() > 0:
        return ""
    lonely = Communicator("world", range(size()), ranks)
    try:
        lonely.all_reduce(torch.ones(1))
    except RuntimeError as error:
        return str(error)
    return "came"


def attention(
    layout: dict[str, int],
    lengths: list[int],
    num_replicated: int,
    seed: int = 0,
    num_kv_heads: int = 4,
    masked: bool = False,
    fault: str = "",
) -> float:
    """Return the largest difference of divided attention from torch's, over this rank's real tokens."""
    ranks, heads, head_size, batch = mesh(**layout), 4, 8, 2
    generator = torch.Generator().manual_seed(seed)
    total = num_replicated + sum(lengths)
    query, key, value = (
        torch.randn(batch, total, count, head_size, generator=generator)
        for count in (heads, num_kv_heads, num_kv_heads)
    )
    seen = torch.ones(batch, total, dtype=torch.bool)
    if masked:
        seen[1, num_replicated // 2 : num_replicated] = False
    mask = seen[:, None, None] if masked else None
    layer = Attention(heads, head_size, num_kv_heads=num_kv_heads)
    wanted = layer(query, key, value, AttentionMetadata(mask))
    tokens = TokenLayout(num_replicated, tuple(lengths), ranks.sequence.size)
    strategy = SequenceParallelAttention(ranks.ulysses, ranks.ring, ranks.sequence)
    strategy.begin(tokens, torch.device("cpu"))
    if fault == "padding":
        strategy.kept = (None,) * len(strategy.kept)
    if fault == "text":
        strategy.num_replicated = 0
    layer.strategy = strategy

    def local(whole: torch.Tensor) -> torch.Tensor:
        parts = whole.split((num_replicated, *lengths), dim=1)
        pieces = [piece_of(part, 1, ranks.sequence.rank, ranks.sequence.size) for part in parts[1:]]
        return torch.cat((parts[0], *pieces), dim=1)

    own_mask = None if mask is None else local(seen.to(torch.uint8)).bool()[:, None, None]
    made = layer(local(query), local(key), local(value), AttentionMetadata(own_mask))
    real = local(torch.ones(1, total, 1)).bool()[0, :, 0]
    return float((made - local(wanted))[:, real].abs().max())


def branches(num_calls: int, size_of_result: int) -> dict[str, Any]:
    """Make calls over the ranks of `cfg`; return which were made here, and whether all results came."""
    ranks, made = mesh(cfg=size()).cfg, []

    def run(call: int) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        made.append(call)
        picture = torch.full((1, size_of_result), float(call))
        return (picture, -picture[:, :1]) if call_is_joint else picture

    right = True
    for call_is_joint in (False, True):
        before = ranks.traffic.num_calls
        for call, result in enumerate(divide_calls(range(num_calls), lambda calls: list(map(run, calls)), ranks)):
            parts = result if isinstance(result, tuple) else (result,)
            right &= (
                bool((parts[0] == call).all())
                and len(parts) == 1 + call_is_joint
                and bool((parts[-1].abs() == call).all())
            )
    return {"made": made[: len(made) // 2], "right": right, "collectives": ranks.traffic.num_calls - before}


def decode(kind: str, height: int, width: int, num_frames: int, seed: int = 0, fault: bool = False) -> float:
    """Return the largest difference of a decode in bands from the library's own."""
    ranks = mesh(tp=size()).world
    torch.manual_seed(seed)
    vae: Any = VAES[kind]().eval().requires_grad_(False)
    channels = vae.config["latent_channels" if kind == "kl" else "z_dim"]
    shape = (1, channels, height, width) if kind == "kl" else (1, channels, num_frames, height, width)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    with torch.inference_mode():
        wanted = vae.decode(latents, return_dict=False)[0]
        if kind == "kl":
            bands = RowBands(ranks)
            divide_decoder(vae.decoder, bands)
            forget_neighbour(bands, fault)
            made = vae.decode(latents, return_dict=False)[0]
        else:
            decoder = BandedCausalDecoder(vae, ranks)
            cache: FeatureCache = {}
            forget_neighbour(decoder.bands, fault)
            frames = [f for index in range(num_frames) for f in decoder.decode(latents[:, :, index : index + 1], cache)]
            made = torch.stack(frames, dim=2)
    assert made.shape == wanted.shape
    return float((made - wanted).abs().max())


def forget_neighbour(bands: RowBands, fault: bool) -> None:
    """Let one rank take zeros for the rows of its neighbour, though they came."""
    framed = bands.framed
    if fault and bands.ranks.rank == 1:
        bands.framed = lambda own, halo: F.pad(framed(own, halo)[:, :, halo:], (0, 0, halo, 0))  # type: ignore[method-assign]


def kl_vae() -> torch.nn.Module:
    """Return an `AutoencoderKL` with attention in the middle, whose channels are far from zero."""
    made = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    return shake(made, 1)


VAES: dict[str, Callable[[], torch.nn.Module]] = {
    "kl": kl_vae,
    "wan": lambda: shake(wan_vae(False), 1),
    "wan, residual": lambda: shake(wan_vae(True), 1),
    "qwen": lambda: shake(AutoencoderKLQwenImage(base_dim=4, z_dim=6, num_res_blocks=1), 1),
}


def text_encoder(folder: str) -> float:
    """Return the largest difference of a language model divided by transformers' own plan, from itself undivided."""
    ranks = mesh(tp=size()).tp
    whole = pipeline(folder).get_module("text_encoder")
    divided = copy.deepcopy(whole)
    plan = library_plan(divided, ranks.size)
    assert plan is not None
    num_parameters = sum(parameter.numel() for parameter in divided.parameters())
    shard_parameters(divided, ranks.rank, ranks.size, plan)
    connect_shards(divided, ranks, plan)
    assert sum(parameter.numel() for parameter in divided.parameters()) < num_parameters
    ids = torch.randint(5, 200, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted, made = (model(input_ids=ids).last_hidden_state for model in (whole, divided))
    return float((made - wanted).abs().max())


def fused(parts: str) -> float:
    """Return the largest difference of a fused projection and an output projection, divided, from themselves whole."""
    ranks = mesh(tp=size()).tp
    torch.manual_seed(0)
    whole = torch.nn.ModuleDict({"qkv": torch.nn.Linear(8, 24), "out": torch.nn.Linear(16, 8)})
    hidden_states = torch.randn(2, 5, 8)
    plan = {"qkv": f"column of {parts}", "out": "row of 1:1"}

    def forward(model: torch.nn.ModuleDict) -> torch.Tensor:
        query, key, value = model["qkv"](hidden_states).chunk(3, dim=-1)
        projected: torch.Tensor = model["out"](torch.cat((query * key, value.tanh()), dim=-1))
        return projected

    with torch.inference_mode():
        wanted = forward(whole)
        shard_parameters(whole, ranks.rank, ranks.size, plan)
        connect_shards(whole, ranks, plan)
        return float((forward(whole) - wanted).abs().max())


def norm_over_ranks(dtype: str, eps: float | None, fault: bool = False) -> float:
    """Return the largest difference of an RMS norm over the channels of all ranks from torch's."""
    ranks = mesh(tp=size()).tp
    torch.manual_seed(0)
    norm = torch.nn.RMSNorm(24, eps=eps, dtype=vars(torch)[dtype])
    torch.nn.init.normal_(norm.weight)
    hidden_states = (3 * torch.randn(2, 7, 24)).to(vars(torch)[dtype])
    model = torch.nn.Sequential(norm)
    with torch.inference_mode():
        wanted = norm(hidden_states).chunk(ranks.size, dim=-1)[ranks.rank]
        shard_parameters(model, ranks.rank, ranks.size, {"0": "norm"})
        connect_shards(model, ranks, {"0": "norm"})
        if fault:
            model[0].ranks = SimpleNamespace(  # type: ignore[assignment]
                size=ranks.size, all_reduce=lambda squares: squares
            )
        made = model(hidden_states.chunk(ranks.size, dim=-1)[ranks.rank])
    return float((made.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def benchmark_forward(family: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Return calls and bytes of a step of the benchmark's tiny stack: as counted, and by formula."""
    stack = replace(STACKS[family], tiny=with_four_heads(STACKS[family].tiny))
    _, *sent = parallel.measured(stack, stack.tiny, mesh(**layout), torch.device("cpu"), rounds=1)
    return {"counted": sent, "predicted": list(parallel.predicted(stack, stack.tiny, ParallelLayout(**layout), 4))}


def with_four_heads(tiny: Size) -> Size:
    """Return a size whose heads divide."""
    return replace(tiny, architecture=replace(tiny.architecture, num_attention_heads=4))


def embeddings(folder: str, recipe: str, case: str) -> bool:
    """Say whether encoders that rank 0 alone has give every rank the embeddings that its own would."""
    ranks = mesh(tp=size()).world
    with patched(recipe):
        loaded = pipeline(folder)
        sharing: dict[str, Sharing] = {name: "first rank" for name in loaded.modules() if "encoder" in name}
        spread = ModelRunner(loaded, [CallsOverRanks(sharing, lone_mesh().cfg, ranks, torch.device("cpu"))])
        wanted, made = (
            encoded(loaded, each, request(loaded, recipe, case, "np")) for each in (ModelRunner(loaded, []), spread)
        )
    return len(wanted) > 0 and all(torch.equal(*pair) for pair in zip(wanted, made, strict=True))


def encoded(loaded: ComposedPipeline, runner: ModelRunner, req: Req) -> list[torch.Tensor]:
    """Return the embeddings of a request."""
    loaded.conditioning_cache.clear()
    with Execution(loaded, req, runner) as execution:
        while not req.in_loop:
            execution.advance()
    return [*req.prompt_embeds, *req.negative_prompt_embeds]


def encoder_that_fails() -> list[str]:
    """Return what each rank raises when the one that has the encoder fails, and whether the next request works."""
    ranks, told = mesh(tp=size()).world, []

    def encoder(forwards: Sequence[Forward]) -> list[Any]:
        assert ranks.rank == 0, "the others have none"
        if not forwards[0].call.kwargs["input_ids"].any():
            raise MemoryError("no room")
        return [{"states": [torch.ones(1, 2), None], "number": 3}]

    shared = CallsOverRanks({"text_encoder": "first rank"}, lone_mesh().cfg, ranks, torch.device("cpu"))

    def call(ids: torch.Tensor) -> list[Forward]:
        return [Forward(ModelCall("text_encoder", {"input_ids": ids}, {}, None, CallKey("r/0", "cond", 0)), ())]

    try:
        shared(call(torch.zeros(1)), encoder)
    except (MemoryError, RankFailedError) as error:
        told.append(f"{type(error).__name__}: {error}")
    (made,) = shared(call(torch.ones(1)), encoder)
    return [*told, str(made["states"][0].tolist()), str(made["states"][1]), str(made["number"])]


def stacked(folder: str, recipe: str, case: str, layout: dict[str, int]) -> list[float]:
    """Return the largest difference of each request's first prediction when they share forwards in a layout."""
    ranks = mesh(**layout)
    with patched(recipe):
        whole, wanted = divide(folder, lone_mesh()), []
        reqs = [request(whole, recipe, case, "latent", seed=seed, prompt=prompt) for seed, prompt in enumerate(TEXTS)]
        for number, req in enumerate(reqs):
            req.request_id = f"r{number}"
            with Execution(whole, req) as execution:
                while not req.in_loop:
                    execution.advance()
                with torch.inference_mode():
                    wanted.append((execution.forwards(), [whole.forward(call) for call in req.pending]))
        calls, alone = [entry[0] for entry in wanted], [entry[1] for entry in wanted]
        together = iter(ModelRunner(divide(folder, ranks), [Stacking()]).run([each for own in calls for each in own]))
        made = [[next(together) for _ in own] for own in calls]
    return [
        max(largest_difference(one, other) for one, other in zip(left, right, strict=True))
        for left, right in zip(made, alone, strict=True)
    ]


def largest_difference(one: Prediction, other: Prediction) -> float:
    """Return the largest absolute difference of two results that are tensors."""
    assert isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return float((one - other).abs().max())


TEXTS = ("a cat", "an old map of the world, drawn in ink")


def mesh_of(layout: dict[str, Any]) -> dict[str, Any]:
    """Return this rank's place on the mesh: as torch's has it, and the ranks of each communicator."""
    made = mesh(**layout)
    communicators = (made.cfg, made.ring, made.ulysses, made.tp)
    torchs = init_device_mesh("cpu", made.layout.sizes, mesh_dim_names=AXES)
    axes = {axis: dist.get_process_group_ranks(torchs.get_group(axis)) for axis in AXES}
    return {
        "place": torchs.get_coordinate(),
        "torch": axes,
        "own": {each.axis: list(each.ranks) for each in communicators},
        "at": [each.rank for each in communicators],
        "sequence": list(made.sequence.ranks),
    }


def too_few(layout: dict[str, Any]) -> str:
    """Return what a mesh of more ranks than there are is refused with."""
    try:
        build_mesh(ParallelLayout(**layout), TIMEOUT)
    except InvalidParameterError as error:
        return str(error)
    return ""


def in_bfloat16(folder: str, recipe: str, case: str, layout: dict[str, Any]) -> float:
    """Return the largest difference of a first prediction in bfloat16 in a layout, over the largest value."""
    with patched(recipe):
        loaded = divide(folder, lone_mesh())
        with Execution(loaded, request(loaded, recipe, case, "latent")) as execution:
            while not execution.req.in_loop:
                execution.advance()
            call = execution.req.pending[0]
            is_half = {name: tensor.ndim > 1 and name != "timestep" for name, tensor in call.kwargs.items()}
            half = {name: tensor.bfloat16() if is_half[name] else tensor for name, tensor in call.kwargs.items()}
            call = replace(call, kwargs=half)
            made = []
            for ranks in (lone_mesh(), mesh(**layout)):
                path = Path(folder) / call.component
                modules: Any = loaded.components.modules
                modules[call.component] = load_transformer(loaded, path, ranks, torch.bfloat16)
                with torch.inference_mode():
                    predicted = loaded.forward(call)
                assert isinstance(predicted, torch.Tensor)
                made.append(predicted)
    assert made[1].dtype == torch.bfloat16
    return float((made[1].float() - made[0].float()).abs().max() / made[0].float().abs().max())
