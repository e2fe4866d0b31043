"""What a server adds and what its scheduling does: fairness, batching, and the way through HTTP.

- fairness: a stub model of known step time on a virtual clock, one video after another always running beside Poisson
  arrivals of images at half load; the 95th percentile of the images' times with and without the videos, and under first
  in, first out.
- batching: row-steps a second of a stream of requests of mixed step counts, eight at a time, against a static batch of
  eight, and the largest difference that stacking makes.
- HTTP: an image through a server against the same in process; and what delivering a video takes beside its encoding.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import begin, interleaved, print_table
from safelight import DiffusionGenerator, ServerArgs
from safelight.attention import set_attention_backend
from safelight.core import registry
from safelight.core.components import Components
from safelight.core.config import PipelineConfig
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.core.stage import PipelineStage
from safelight.families.flux.transformer import FluxArchitecture, FluxTransformer2DModel
from safelight.layers.rotary import rotary_table
from safelight.loading.loader import load_pipeline
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.policy import Policy, Task
from safelight.stages.denoising import DenoisingStage
from tests.live_server import FAULT, fault_model, generate, serving

IMAGE_STEPS = 20
VIDEO_STEPS = 50
VIDEO_SIDE = 320
"""The video's step takes five times an image's: it has five times the tokens."""


class VirtualClock:
    """A clock that only simulated work and waiting move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the seconds that have passed."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class FirstComeFirstServed(Policy):
    """What the policy is compared with."""

    def order(self, tasks: Any, now: float) -> list[Task]:
        """Return the tasks by arrival."""
        return sorted(tasks, key=lambda task: task.arrival)


@dataclass(frozen=True)
class Fairness:
    """What images waited for.

    Attributes:
        p95: 95th percentile of an image's time from arrival to end, in times alone.
        video_share: of the time that the video had the device.
        video_slowdown: how many times as long as alone a video took, on average.

    """

    p95: float
    video_share: float
    video_slowdown: float


def simulate(
    pipeline: ComposedPipeline, clock: VirtualClock, *, load: float, images: int, seed: int, policy: Policy, video: bool
) -> Fairness:
    """Run images at Poisson arrivals, with or without a video that never ends.

    Args:
        pipeline: whose step of 64 tokens takes one second of the clock.
        clock: that the pipeline's steps move.
        load: of the device by images alone.
        images: how many.
        seed: of the arrivals.
        policy: of the engine.
        video: whether videos run, one after another.

    """
    gaps = np.random.default_rng(seed).exponential(IMAGE_STEPS / load, images)
    start = clock.now
    arrivals = list(start + np.cumsum(gaps))
    engine = Engine(pipeline, policy, max_running=2, clock=clock)
    came: dict[Task, float] = {}
    times: list[float] = []
    video_steps, video_times = 0, []
    current: Task | None = None
    while len(times) < images:
        if video and (current is None or current.done):
            if current is not None:
                video_times.append(clock.now - current.arrival)
                video_steps += VIDEO_STEPS
            current = engine.add(make_request(pipeline, "video", VIDEO_STEPS, VIDEO_SIDE))
        while arrivals and arrivals[0] <= clock.now:
            name, arrived = f"image {len(came)}", arrivals.pop(0)
            came[engine.add(make_request(pipeline, name, IMAGE_STEPS, 64))] = arrived
        if not engine.tasks:
            clock.now = arrivals[0]
            continue
        times += [clock.now - came[task] for task in engine.tick() if task.done and task in came]
    elapsed, step_seconds = clock.now - start, VIDEO_SIDE / 64
    video_steps += current.execution.req.step_index if current is not None else 0
    for task in list(engine.tasks):
        engine.cancel(task.request_id)
    slowdown = statistics.mean(video_times) / (VIDEO_STEPS * step_seconds) if video_times else 0.0
    return Fairness(float(np.percentile(times, 95)) / IMAGE_STEPS, video_steps * step_seconds / elapsed, slowdown)


def make_request(pipeline: ComposedPipeline, name: str, num_steps: int, width: int, seed: int = 0) -> Req:
    """Return a request of one output."""
    fields = {"prompt": name, "seed": seed, "num_inference_steps": num_steps, "width": width, "height": 64}
    params = pipeline.schema.params_cls.from_fields(fields).resolve(pipeline.schema)
    return Req(name, params.split()[0])


def register_stub() -> None:
    """Make the stub models known in this process."""
    if str(FAULT) not in sys.path:
        sys.path.insert(0, str(FAULT))
    if "FaultPipeline" not in registry.pipelines():
        importlib.import_module("safelight_fault.register")


def fairness(images: int) -> None:
    """Print the table of fairness."""
    register_stub()
    from safelight_fault.pipeline import FaultPipeline

    clock = VirtualClock()
    FaultPipeline.sleep = staticmethod(clock.sleep)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = fault_model(Path(folder) / "model", step_seconds=1.0)
        pipeline = load_pipeline(ServerArgs(str(model), device="cpu"))
        for seed in range(3):
            asked: dict[str, Any] = {"load": 0.5, "images": images, "seed": seed}
            alone = simulate(pipeline, clock, **asked, policy=Policy(window=600), video=False)
            rows.append([str(seed), "images alone", f"{alone.p95:.2f}", "", "", ""])
            for name, policy in (("Safelight", Policy(window=600)), ("first in, first out", FirstComeFirstServed())):
                both = simulate(pipeline, clock, **asked, policy=policy, video=True)
                ratio = f"{both.p95 / alone.p95:.2f}"
                rows.append(
                    [str(seed), name, f"{both.p95:.2f}", ratio, f"{both.video_share:.2f}", f"{both.video_slowdown:.1f}"]
                )
    FaultPipeline.sleep = staticmethod(time.sleep)
    print_table(["arrivals", "policy", "p95 / time alone", "ratio", "video's share", "video's slow-down"], rows)


class StackedTransformer(ComposedPipeline):
    """A transformer of width 128 in the standard loop, and nothing else: what batching acts on."""

    pipeline_name = "StackedTransformer"

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add the loop."""
        self.add_stage(Noise(), "noise")
        self.add_stage(Loop(self.config), "denoising")


class Noise(PipelineStage):
    """Draws the noise, and what the transformer is given besides."""

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        """Fill what the loop needs."""
        assert batch.params.seed is not None and batch.params.num_inference_steps is not None
        batch.generator = torch.Generator().manual_seed(batch.params.seed)
        batch.raw_latent_shape = (1, NUM_TOKENS, CHANNELS)
        batch.latents = torch.randn(batch.raw_latent_shape, generator=batch.generator)
        batch.prompt_embeds = [torch.randn(1, NUM_TEXT_TOKENS, TEXT_WIDTH, generator=batch.generator)]
        batch.num_inference_steps = batch.params.num_inference_steps
        batch.timesteps = torch.linspace(1, 0, batch.num_inference_steps + 1)[:-1]
        return batch


class Loop(DenoisingStage):
    """The standard loop with Euler's step."""

    def advance(self, batch: Req, predictions: list[Any]) -> None:
        """Take a step."""
        batch.latents = batch.latents - predictions[0] / batch.num_inference_steps
        batch.step_index += 1
        if batch.step_index == batch.num_inference_steps:
            batch.outputs = [batch.latents]


@dataclass(frozen=True, kw_only=True)
class StackedConfig(PipelineConfig):
    """How the transformer is called."""

    task = ModelTaskType.T2I
    shared_kwargs = frozenset({"freqs_cis"})

    freqs_cis: Tensor

    def call_signature(self, branch: str, batch: Req) -> tuple[Any, ...]:
        """Return the size, which all have in common."""
        return batch.raw_latent_shape

    def prepare_branch_kwargs(self, branch: str, batch: Req, latent_model_input: Any, t: Tensor) -> dict[str, Tensor]:
        """Return the arguments of a call."""
        return {
            "hidden_states": latent_model_input,
            "encoder_hidden_states": batch.prompt_embeds[0],
            "pooled_projections": batch.prompt_embeds[0].mean(1),
            "timestep": t[None],
            "freqs_cis": self.freqs_cis,
        }


NUM_TOKENS, NUM_TEXT_TOKENS, CHANNELS, TEXT_WIDTH = 32, 16, 16, 32
ROWS = 8


def stacked_pipeline() -> ComposedPipeline:
    """Return the pipeline, with random weights."""
    torch.manual_seed(0)
    architecture = FluxArchitecture(
        in_channels=CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    transformer = FluxTransformer2DModel(architecture).eval().requires_grad_(False)
    set_attention_backend(transformer, "auto", "cpu", torch.float32)
    positions = torch.arange(NUM_TEXT_TOKENS + NUM_TOKENS)
    freqs_cis = rotary_table(torch.stack((positions * 0, positions, positions % 7), 1), (8, 12, 12))
    config = StackedConfig(
        vae_scale_factor=8, latent_channels=CHANNELS, vae_scale=1.0, vae_shift=0.0, freqs_cis=freqs_cis
    )
    schema = ModelSchema("stacked", "StackedTransformer", ModelTaskType.T2I, SamplingParams, SIZES, 8)
    return StackedTransformer(Components({"transformer": transformer}), config, schema, ServerArgs(device="cpu"))


SIZES = {**SamplingParams.defaults, "height": 64, "width": 64}


def run_stream(pipeline: ComposedPipeline, steps: list[int], batching: Any) -> list[Tensor]:
    """Run requests of the given numbers of steps, eight at a time; return their results."""
    engine = Engine(pipeline, max_running=ROWS, batching=batching)
    tasks = [engine.add(make_request(pipeline, f"r{index}", count, 64, index)) for index, count in enumerate(steps)]
    while engine.tasks:
        engine.tick()
    return [task.execution.req.outputs[0] for task in tasks]


def stream_row_steps(pipeline: ComposedPipeline, steps: list[int], batching: Any) -> int:
    """Run requests of the given numbers of steps while eight of them run; return the row-steps that were done."""
    engine = Engine(pipeline, max_running=ROWS, batching=batching)
    tasks = [engine.add(make_request(pipeline, f"r{index}", count, 64, index)) for index, count in enumerate(steps)]
    while len(engine.tasks) >= ROWS:
        engine.tick()
    return sum(task.execution.req.step_index for task in tasks)


def run_static(pipeline: ComposedPipeline, row_steps: int) -> None:
    """Run as many row-steps as a batch of eight that never changes."""
    reqs = [make_request(pipeline, f"r{index}", 1, 64, index) for index in range(ROWS)]
    kwargs = []
    for req in reqs:
        Noise().forward(req, pipeline.server_args)
        assert isinstance(req.latents, Tensor)
        kwargs.append(pipeline.config.prepare_branch_kwargs("cond", req, req.latents, torch.tensor(0.5)))
    stacked = {name: torch.cat([each[name] for each in kwargs]) for name in kwargs[0] if name != "freqs_cis"}
    transformer = pipeline.get_module("transformer")
    with torch.inference_mode():
        for _ in range(row_steps // ROWS):
            transformer(**stacked, freqs_cis=kwargs[0]["freqs_cis"])


def batching(rounds: int) -> None:
    """Print the table of batching."""
    pipeline = stacked_pipeline()
    steps = [int(count) for count in np.random.default_rng(0).integers(8, 41, 64)]
    row_steps = {name: stream_row_steps(pipeline, steps, name) for name in ("throughput", "exact")}
    sides: dict[str, Callable[[], object]] = {
        "static batch of 8": lambda: run_static(pipeline, sum(steps)),
        "stream, throughput": lambda: stream_row_steps(pipeline, steps, "throughput"),
        "stream, exact": lambda: stream_row_steps(pipeline, steps, "exact"),
    }
    seconds = interleaved(sides, rounds)
    counts = [sum(steps) // ROWS * ROWS, *row_steps.values()]
    rates = {name: count / value for count, (name, value) in zip(counts, seconds.items(), strict=True)}
    best = rates["static batch of 8"]
    print_table(
        ["side", "row-steps a second", "of the static batch"],
        [[name, f"{rate:.0f}", f"{rate / best:.2f}"] for name, rate in rates.items()],
    )
    exact, stacked = run_stream(pipeline, steps, "exact"), run_stream(pipeline, steps, "throughput")
    largest = max(float((one - other).abs().max()) for one, other in zip(exact, stacked, strict=True))
    print(f"largest difference of stacked latents: {largest:.1e}\n")


def through_http(rounds: int) -> None:
    """Print what HTTP adds to an image, and what delivering a video takes."""
    prompt, rows = "a large red circle at the left on a white background", []
    with (
        tempfile.TemporaryDirectory() as folder,
        DiffusionGenerator.from_pretrained(device="cpu") as generator,
        serving(Path(folder), None) as server,
        server.http() as http,
    ):
        sides: dict[str, Callable[[], object]] = {
            "in process": lambda: generator.generate(prompt, seed=1, num_inference_steps=4),
            "through HTTP": lambda: generate(http, prompt, seed=1, num_inference_steps=4).raise_for_status(),
        }
        seconds = interleaved(sides, rounds, wall_clock)
        added = 1000 * (seconds["through HTTP"] - seconds["in process"])
        rows.append(["an image of 4 steps, ms", f"{1000 * seconds['in process']:.1f}", f"added {added:.1f}"])
    with tempfile.TemporaryDirectory() as folder:
        model = fault_model(Path(folder) / "model", "FaultVideoPipeline")
        with serving(Path(folder), model) as server, server.http() as http:
            body = {"prompt": prompt, "seed": 1, "num_frames": 81, "height": 480, "width": 832}
            lags = []
            for _ in range(rounds):
                begun = time.perf_counter()
                job = http.post("/v1/videos", json=body).json()
                with http.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
                    last = [json.loads(line[5:]) for line in events.iter_lines() if line.startswith("data:")][-1]
                wall = time.perf_counter() - begun
                lags.append(wall - sum(last["job"]["stage_seconds"].values()))
            encoding = last["job"]["stage_seconds"]["encoding"]
            rows.append(
                ["a video of 81x480x832, s", f"encoding {encoding:.2f}", f"added {statistics.median(lags):.2f}"]
            )
    print_table(["what", "alone", "by the server"], rows)


def wall_clock(run: Callable[[], object]) -> float:
    """Return wall seconds: another process does the work."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["fairness", "batching", "http"], help="one part")
    parser.add_argument("--images", type=int, default=1000, help="of the simulation")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = begin(parser)
    images, rounds = (100, 1) if arguments.quick else (arguments.images, arguments.rounds)
    parts: dict[str, Callable[[], None]] = {
        "fairness": lambda: fairness(images),
        "batching": lambda: batching(rounds),
        "http": lambda: through_http(rounds),
    }
    for name, part in parts.items():
        if arguments.only in (None, name):
            part()


if __name__ == "__main__":
    main()
