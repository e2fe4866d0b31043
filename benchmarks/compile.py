"""Compiled blocks beside eager ones: a stack's forward, and a server's first request while it compiles.

The stack runs in one process, interleaved, one thread. The server serves the shipped model, or `--model`; the first
request is sent as soon as it is ready, while another process compiles.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.common import as_safelight_calls, begin, interleaved, print_table, relative_error
from benchmarks.stacks import STACKS, Grid, Stack, num_tokens
from safelight.acceleration.compile import compile_blocks, compiling, in_form, use_cache
from safelight.core.server_args import ServerArgs
from safelight.preparation import prepare
from safelight.runtime.client import GenerationRequest
from safelight.runtime.settings import EngineSettings
from safelight.runtime.supervisor.supervisor import Supervisor

QUICK: Grid = (1, 8, 8)
TARGET = 1.1
COMPILE_SECONDS = 1800.0


def measure_stack(stack: Stack, grid: Grid, dtype: torch.dtype, rounds: int) -> list[str]:
    """Return the table's row of a family and dtype."""
    architecture = stack.small.architecture
    reference = stack.diffusers_transformer(architecture, dtype)
    ours = stack.our_transformer(architecture, reference.state_dict())
    arguments = stack.inputs(stack.small, grid, dtype).for_safelight()
    classes = compile_blocks(ours)
    forward = as_safelight_calls(ours)
    begun = time.process_time()
    with compiling(classes):
        forward(**arguments)
    build = time.process_time() - begun

    def compiled() -> Any:
        with in_form(classes, "compiled"):
            return forward(**arguments)

    sides: dict[str, Callable[[], Any]] = {"eager": lambda: forward(**arguments), "compiled": compiled}
    error = relative_error(compiled(), sides["eager"]())
    seconds = interleaved(sides, rounds)
    shown = [f"{seconds[side] * 1000:.0f} ms" for side in sides]
    ratio = f"{seconds['eager'] / seconds['compiled']:.3f}"
    return [stack.name, str(dtype).removeprefix("torch."), *shown, ratio, f"{error:.1e}", f"{build:.1f} s"]


async def latencies(args: ServerArgs, fields: dict[str, Any], num_requests: int) -> tuple[list[float], list[float]]:
    """Return the seconds of a new server's first requests, and of as many later ones.

    Later is when the model is compiled, where it is to be; the first ones end when they are answered.
    """
    supervisor = Supervisor(EngineSettings(server_args=args))
    told = asyncio.Event()
    supervisor.on_compiled = lambda reason: told.set()
    await supervisor.start()
    try:
        first = [await answered(supervisor, fields, f"first{index}") for index in range(num_requests)]
        if args.compile != "none":
            await asyncio.wait_for(told.wait(), COMPILE_SECONDS)
            assert supervisor.stats.compiled, "it could not be compiled; the log says why"
        return first, [await answered(supervisor, fields, f"later{index}") for index in range(num_requests)]
    finally:
        await supervisor.close()


async def answered(supervisor: Supervisor, fields: dict[str, Any], name: str) -> float:
    """Return the seconds of one request."""
    assert supervisor.schema is not None
    begun = time.perf_counter()
    await supervisor.submit(GenerationRequest(name, prepare(supervisor.schema, fields)[0])).result()
    return time.perf_counter() - begun


def measure_server(model: str | None, steps: int, num_requests: int) -> list[list[str]]:
    """Return the table's rows: a server that compiles in the background beside one that does not."""
    fields = {"prompt": "a large red circle at the left on a white background", "seed": 0, "num_inference_steps": steps}
    rows, steady = [], 0.0
    for name in ("none", "blocks"):
        first, later = asyncio.run(latencies(ServerArgs(model, compile=name), fields, num_requests))
        steady = steady or statistics.median(later)
        shown = [f"{seconds * 1000:.0f} ms" for seconds in (first[0], statistics.median(first[1:]))]
        rows.append([name, *shown, f"{statistics.median(later) * 1000:.0f} ms", f"{first[0] / steady:.3f}"])
    return rows


def main() -> None:
    """Measure stacks, then the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=list(STACKS), default=list(STACKS))
    parser.add_argument("--rounds", type=int, default=3, help="rounds of A B B A")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--model", default=None, help="that the server serves; the shipped model by default")
    parser.add_argument("--steps", type=int, default=40, help="of a request")
    parser.add_argument("--requests", type=int, default=5, help="before and after the switch")
    arguments = begin(parser)
    use_cache()
    rows = []
    for stack in (STACKS[name] for name in arguments.family):
        grid = QUICK if arguments.quick else next(iter(stack.small.grids.values()))
        tokens = num_tokens(grid)
        for dtype in arguments.dtypes[: 1 if arguments.quick else None]:
            rows.append(measure_stack(stack, grid, getattr(torch, dtype), 1 if arguments.quick else arguments.rounds))
        print(f"{stack.name}-like: {tokens} tokens and {stack.small.num_text} of text")
    print(f"{counters['inductor']['fxgraph_cache_hit']} graphs were in the cache")
    print_table(["stack", "dtype", "eager", "compiled", "eager / compiled", "relative error", "compiling"], rows)
    print(f"a server's requests of {arguments.steps} steps; first over steady eager is to be at most {TARGET}")
    served = measure_server(arguments.model, arguments.steps, 3 if arguments.quick else arguments.requests)
    print_table(["compile", "first", "next", "later", "first / steady eager"], served)


if __name__ == "__main__":
    main()
