"""What a model needs for a request, from its JSON alone: its stages run with every component on the meta device."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import nn

from safelight.acceleration.activations import HOST, LiveStorages, Valueless, on_host, on_meta
from safelight.acceleration.blocks import repeated_blocks
from safelight.acceleration.offload import packed_bytes, tensors_of
from safelight.acceleration.plan import ComponentFootprint, Footprint, StageFootprint
from safelight.backends.diffusers import DiffusersPipeline
from safelight.core.calls import ModelCall
from safelight.core.components import Components
from safelight.core.executor import Execution
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.registry import resolve_class
from safelight.core.request import Req, map_tensors
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.core.trees import Tree, map_tree
from safelight.errors import InvalidParameterError
from safelight.loading.components import empty_component, load_component
from safelight.loading.description import configure, describe_package, sources
from safelight.loading.package_footprint import empty_package, rehearse_package
from safelight.loading.repository import Repository
from safelight.loading.vaes import run_vae

TOKEN = re.compile(r"<\|\w+\|>|\S+")
UNCUT = 4096
"""Tokens of a text that is not cut."""
NUM_STEPS = 4
"""Denoising steps that are run: as much memory as any number of them, and each transformer has its turn."""
SIDE = 1024
"""Of the input images of a request that says nothing of its size, in pixels."""


def measure(
    repository: Repository, server_args: ServerArgs, fields: Mapping[str, Any], with_tiles: bool = False
) -> Footprint:
    """Return what a model needs for one output of a request. No weights are read.

    Args:
        repository: the model.
        server_args: dtypes; where none is set, bfloat16, as on an accelerator.
        fields: sampling parameters; what is not there takes the model's defaults. Input images may be of any content.
        with_tiles: whether decoding in bands is rehearsed too, where the VAE can be decoded so.

    Raises:
        UsageError: for a field that the model does not take.
        ModelError: if its JSON describes no model.

    """
    pipeline = empty_pipeline(repository, server_args)
    req = request(pipeline.schema, fields)
    peaks = rehearsed(pipeline, req)
    tiled = None
    if with_tiles:
        with contextlib.suppress(InvalidParameterError):  # a VAE that cannot be decoded so
            in_bands = empty_pipeline(repository, server_args, in_bands=True)
            tiled = rehearsed(in_bands, request(in_bands.schema, fields)).stages()
    streamed = pipeline.denoisers().keys() - peaks.undivided
    components = {
        name: component_footprint(module, name in pipeline.alternates, name in streamed)
        for name, module in pipeline.modules().items()
    }
    return Footprint(components, peaks.stages(), peaks.num_branches, in_words(pipeline.schema, req), tiled)


def rehearsed(pipeline: ComposedPipeline, req: Req) -> Peaks:
    """Return what each stage of a request needs beside weights."""
    with LiveStorages() as live:
        peaks = Peaks(live, req.params.num_branches())
        if isinstance(pipeline, DiffusersPipeline):
            rehearse_package(pipeline, req, peaks)
        else:
            rehearse(pipeline, req, peaks)
    return peaks


class Peaks:
    """The most bytes that were alive on the device in each stage, by what a mode counts.

    Args:
        live: counts, on the host too: of what lies there, finished media are taken off.
        num_branches: forwards of a denoising step, as far as the request says.

    Attributes:
        most: bytes by the names of stage and component.
        num_branches: forwards of a denoising step.
        undivided: components whose blocks cannot come one by one: some are reached otherwise than by a call.

    """

    def __init__(self, live: LiveStorages, num_branches: int = 1) -> None:
        self.most: dict[tuple[str, str], int] = {}
        self.num_branches = num_branches
        self.undivided: set[str] = set()
        self._live = live
        self._media = 0

    def stages(self) -> list[StageFootprint]:
        """Return what was noted."""
        return [StageFootprint(stage, name, peak) for (stage, name), peak in self.most.items()]

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """Leave out that a tensor and its copy are alive at once: a real request's are where they are used."""
        before = self._live.peak
        yield
        self._live.peak = max(before, self._live.num_bytes)

    def record(self, req: Req, stage: str, component: str) -> bool:
        """Take note of a unit, or a call, that has just ended; say whether it needed more than those before."""
        peak, before = self._live.peak - self._media, self.most.get((stage, component), 0)
        self.most[stage, component] = max(peak, before)
        self._live.peak, self._media = 0, sum(output.nbytes for output in req.outputs)
        return peak > before


def empty_pipeline(repository: Repository, server_args: ServerArgs, in_bands: bool = False) -> ComposedPipeline:
    """Return a pipeline that is whole but for its components' weights, which are on the meta device.

    Raises:
        InvalidParameterError: if its VAE cannot be decoded in bands, and is to be.

    """
    dtype = "bfloat16" if server_args.dtype == "auto" else server_args.dtype
    # What is not a component's work is done for real, on the host.
    args = dataclasses.replace(
        server_args, device="cpu", dtype=dtype, offload="none", memory_limit=None, conditioning_cache="0"
    )
    if repository.pipeline.backend != "native":
        return empty_package(repository, describe_package(repository), args, in_bands)
    config, schema = configure(repository)
    pipeline_cls = repository.pipeline.pipeline_cls()
    modules: dict[str, Any] = {}
    for name, source in sources(repository, pipeline_cls).items():
        if name.startswith("tokenizer"):
            modules[name] = LongestText()
        elif issubclass(resolve_class(source.target), nn.Module):
            modules[name] = empty_component(source, args.component_dtype(name, config.precisions.get(name)))
        else:
            modules[name] = load_component(source, torch.float32, HOST)
    for name, module in modules.items():
        if name.startswith("text_encoder"):
            module.register_forward_pre_hook(tokens_alone, with_kwargs=True)
    vae = run_vae(modules["vae"], in_bands=in_bands) if "vae" in modules else None
    return pipeline_cls(Components(modules, vae=vae), config, schema, args)


class LongestText:
    """Stands for a tokenizer: every text is as long as the encoder takes it; where all of it is, its words count."""

    def __call__(self, text: str, max_length: int | None = None, **_: Any) -> SimpleNamespace:
        """Return ids and mask, int64 [1, S]."""
        ids = torch.zeros(1, min(max_length or len(TOKEN.findall(text)), UNCUT), dtype=torch.int64)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    def convert_tokens_to_ids(self, token: str) -> int:
        """Return the one id that there is."""
        return 0


def tokens_alone(encoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a text encoder its tokens alone: of images, which it would look at, their places among the tokens count."""
    return args, {name: kwargs[name] for name in ("input_ids", "attention_mask") if name in kwargs}


def request(schema: ModelSchema, fields: Mapping[str, Any]) -> Req:
    """Return a request for one output, with grey input images where the model needs them."""
    size = fields.get("height") or SIDE, fields.get("width") or SIDE
    given: dict[str, Any] = {
        **schema.params_cls.example_fields(*size),
        "seed": 0,
        "n": 1,
        "output_type": "pil",
        **fields,
    }
    if schema.num_input_images[0] and "image" not in fields:
        given["image"] = blank_images(schema.num_input_images[0], *size)
    if schema.params_cls.num_steps is SamplingParams.num_steps and "num_inference_steps" in schema.params_cls.options():
        given["num_inference_steps"] = NUM_STEPS
    params = schema.params_cls.from_fields(given).resolve(schema)
    return Req(request_id="plan", params=params.split()[0])


def blank_images(count: int, height: int | None, width: int | None) -> list[Image.Image]:
    """Return grey pictures."""
    return [Image.new("RGB", (width or SIDE, height or SIDE), (128, 128, 128)) for _ in range(count)]


def rehearse(pipeline: ComposedPipeline, req: Req, peaks: Peaks) -> None:
    """Run a request through all stages, its components on the meta device and everything else on the host.

    The last stage is left when a unit needs no more than those before: a video's frames are decoded alike, once what is
    remembered of earlier ones is complete.

    Args:
        pipeline: its components are on the meta device.
        req: the request.
        peaks: takes note of each unit, and call, of a component.

    """
    made: dict[Hashable, Tree] = {}
    with Valueless(), torch.inference_mode(), Execution(pipeline, req) as execution:
        more, last, repeats = True, list(pipeline.stages)[-1], False
        while more and not repeats:
            stage, names = req.stage, [] if req.in_loop else [call.component for call in req.pending]
            outputs, req.outputs = req.outputs, []  # they are on the host already
            with peaks.moving():
                map_tensors(req, on_meta if names else on_host)
            req.outputs = outputs
            results = []
            for call in req.pending:
                results.append(rehearse_step(pipeline, call, made) if req.in_loop else pipeline.forward(call))
                if req.in_loop:
                    peaks.record(req, stage, call.component)
            more = execution.advance(results)
            del results
            grew = [peaks.record(req, stage, name) for name in names]
            repeats = stage == last and bool(grew) and not any(grew)


def rehearse_step(pipeline: ComposedPipeline, call: ModelCall, made: dict[Hashable, Tree]) -> Tree:
    """Return what a call of a step would, as zeros on the host; a component runs once for calls that may be stacked."""
    if call.stack_key not in made:
        on_device = dataclasses.replace(
            call, kwargs=map_tree(dict(call.kwargs), on_meta), shared_kwargs=map_tree(dict(call.shared_kwargs), on_meta)
        )
        made[call.stack_key] = map_tree(pipeline.forward(on_device), on_host)
    return made[call.stack_key]


def component_footprint(module: nn.Module, is_alternate: bool, is_streamed: bool) -> ComponentFootprint:
    """Return what a component takes, and its blocks where they may come one by one."""
    by_dtype: Counter[str] = Counter()
    for tensor in tensors_of(module):
        by_dtype[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    blocks = tuple(map(packed_bytes, repeated_blocks(module))) if is_streamed else ()
    dtypes = tuple(name for name, num_bytes in by_dtype.most_common() if num_bytes)
    return ComponentFootprint(packed_bytes(module), dtypes, blocks, is_alternate)


def in_words(schema: ModelSchema, req: Req) -> str:
    """Return the size of a request, such as `1280x720, 81 frames`."""
    if "height" in req.params.options() and req.params.height is None:
        return "its default size"
    height, width = req.params.output_size(schema.size_multiple)
    frames = f", {req.params.num_frames} frames" if req.params.num_frames else ""
    return f"{width}x{height}{frames}"
