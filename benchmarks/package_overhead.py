"""What it costs that each call of a network of the diffusers package is a unit, a step and a further call of a step.

Three sides run one FLUX pipeline in turns: Diffusers alone, Safelight's coroutine over it driven to its end, and the
same in a server's engine. The network answers at once, so that what is around it counts: the pipeline's own loop, its
solver, and on our side all that happens to a call. What a picture takes at two numbers of steps is a line: its slope is
a step. With true guidance a step asks the network twice: the difference is a further call. Beside them the bare round
trip of two threads that wait for each other by two semaphores, which each call has.

All threads share one core, so that the process's CPU time is what passes, and other programs count less; of many rounds
the medians:

    OMP_NUM_THREADS=1 python -m benchmarks.package_overhead --rounds 100
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import begin, print_table
from benchmarks.overhead import REQUEST, build
from safelight.core.executor import Execution
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.loading.loader import load_pipeline
from safelight.preparation import prepare
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.model_runner import PipelineRunner

FEW_STEPS, MANY_STEPS = 5, 45
STEP_TARGET, CALL_TARGET = 150, 80
ROUND_TRIPS = 500
CALLS: dict[int, dict[str, Any]] = {1: {}, 2: {"negative_prompt": "blurry", "true_cfg_scale": 2.0}}
"""By how often a step asks the network, what is asked for."""
Side = Callable[[int, int], object]
"""Makes a picture, of so many calls a step and so many steps."""


def diffusers_side(folder: Path) -> Side:
    """Return Diffusers' pipeline, without its progress bar, in the mode that ours runs in."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    def make(num_calls: int, num_steps: int) -> object:
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            return pipeline(
                **REQUEST, **CALLS[num_calls], num_inference_steps=num_steps, generator=generator, output_type="np"
            )

    return make


def answer_at_once() -> None:
    """Have the network return what it is given, on every side."""
    from diffusers import FluxTransformer2DModel

    taken = FluxTransformer2DModel.forward

    @functools.wraps(taken)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return (hidden_states,)

    FluxTransformer2DModel.forward = forward


def request(pipeline: ComposedPipeline, num_calls: int, num_steps: int) -> Req:
    """Return a request of so many calls a step and so many steps."""
    fields = {**REQUEST, **CALLS[num_calls], "num_inference_steps": num_steps, "seed": 0, "output_type": "np"}
    return Req("request", prepare(pipeline.schema, fields)[0])


def coroutine_side(pipeline: ComposedPipeline) -> Side:
    """Return Safelight's coroutine over the package's pipeline, driven to its end."""
    runner = PipelineRunner(pipeline)

    def make(num_calls: int, num_steps: int) -> object:
        with Execution(pipeline, request(pipeline, num_calls, num_steps), runner) as execution:
            while execution.advance():
                pass
        return execution.req.outputs

    return make


def engine_side(pipeline: ComposedPipeline) -> Side:
    """Return the same in the engine of a server, with nobody else."""
    engine = Engine(pipeline)

    def make(num_calls: int, num_steps: int) -> object:
        task = engine.add(request(pipeline, num_calls, num_steps))
        while not task.done:
            engine.tick()
        return task.execution.req.outputs

    return make


def round_trip() -> float:
    """Return the seconds of a round trip between two threads that wait for each other by semaphores."""
    asked, answered = threading.Semaphore(0), threading.Semaphore(0)

    def answer() -> None:
        for _ in range(ROUND_TRIPS):
            asked.acquire()
            answered.release()

    thread = threading.Thread(target=answer)
    thread.start()
    begun = time.process_time()
    for _ in range(ROUND_TRIPS):
        asked.release()
        answered.acquire()
    seconds = time.process_time() - begun
    thread.join()
    return seconds / ROUND_TRIPS


def timed(side: Side, num_calls: int, num_steps: int) -> float:
    """Return the seconds that a picture takes."""
    begun = time.process_time()
    side(num_calls, num_steps)
    return time.process_time() - begun


def per_step(samples: dict[tuple[str, int, int], list[float]], name: str, num_calls: int) -> float:
    """Return the median seconds of a step of so many calls on a side."""
    few, many = (statistics.median(samples[name, num_calls, num_steps]) for num_steps in (FEW_STEPS, MANY_STEPS))
    return (many - few) / (MANY_STEPS - FEW_STEPS)


def main() -> None:
    """Measure both of our sides and Diffusers, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="rounds of A B C C B A")
    arguments = begin(parser)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        answer_at_once()
        pipeline = load_pipeline(ServerArgs(model=folder, device="cpu", dtype="float32", backend="diffusers"))
        sides = {
            "Diffusers": diffusers_side(Path(folder)),
            "the coroutine": coroutine_side(pipeline),
            "in the engine": engine_side(pipeline),
        }
        samples: dict[tuple[str, int, int], list[float]] = {}
        trips = []
        for number in range(3 if arguments.quick else arguments.rounds + 1):
            trips.append(round_trip())
            for num_calls in CALLS:
                for num_steps in (FEW_STEPS, MANY_STEPS):
                    for name in (*sides, *reversed(sides)):
                        seconds = timed(sides[name], num_calls, num_steps)
                        if number:  # the first round warms up
                            samples.setdefault((name, num_calls, num_steps), []).append(seconds)
    print(f"a network that answers at once; µs more than Diffusers: {STEP_TARGET} and {CALL_TARGET} are wanted at most")
    rows = []
    for name in sides:
        one, two = (per_step(samples, name, num_calls) * 1e6 for num_calls in CALLS)
        base, base_two = (per_step(samples, "Diffusers", num_calls) * 1e6 for num_calls in CALLS)
        more = ["", ""] if name == "Diffusers" else [f"{one - base:.0f}", f"{two - base_two - one + base:.0f}"]
        rows.append([name, f"{one:.0f}", f"{two - one:.0f}", *more])
    print_table(["", "a step of one call, µs", "a further call", "more a step", "more a further call"], rows)
    print(f"a bare round trip of two semaphores: {statistics.median(trips) * 1e6:.0f} µs")


if __name__ == "__main__":
    main()
