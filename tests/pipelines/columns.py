"""The columns of docs/pipelines.md: each asks one thing of a pipeline through the engine, and says yes or why not."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from safelight import DiffusionGenerator, video
from safelight.acceleration.plan import WORKSPACE, plan_mode
from safelight.backends.refusals import one_line
from safelight.core.executor import Execution
from safelight.core.request import map_tensors
from safelight.errors import SafelightError
from safelight.loading.footprint import measure as measure_memory
from safelight.loading.planning import layout_for
from safelight.loading.repository import open_repository
from safelight.results import GenerationOutput
from safelight.runtime.worker.model_runner import PipelineRunner
from tests.acceleration.memories import LateMemory
from tests.backends.recipes import requests as asked
from tests.features.runs import Seen, watch_components
from tests.pipelines.subject import (
    Subject,
    arrays,
    count_forwards,
    difference,
    finish,
    live_tensors,
    step_threads,
    steps_of,
    together,
)

YES = "yes"
BOUND = 1e-4
"""Of the difference where operations, or the order of sums, are others; pixels are in [0, 1]."""
PLENTY = "4GiB"
"""Of memory: under it, loading says only whether a model can have an offload at all."""
UNMOVABLE = "its state lies in a thread of its own"
LAYOUTS: Mapping[str, Mapping[str, Any]] = {"CFG": {"cfg_parallel_size": 2}, "Ulysses": {"ulysses_degree": 2}}


def equal(subject: Subject) -> str:
    """Several seeds, and two requests that differ, against Diffusers alone."""
    for seed, second in ((1, False), (2, False), (3, True)):
        apart = difference(subject.alone(seed, second), subject.expected(seed, second))
        if apart and difference(subject.expected(seed, second), subject.expected(seed, second)):
            return "Diffusers makes something else each time: it draws from the process's random numbers"
        if apart:
            return "it makes something else than Diffusers"
    if not difference(subject.alone(1), subject.alone(2)):
        return "the seed changes nothing"
    return YES


def several(subject: Subject) -> str:
    """Two outputs of one request are the two seeds."""
    reqs = subject.requests(subject.plain, 1, n=2)
    together(subject.plain, reqs)
    apart = max(difference(arrays(req.outputs), subject.alone(seed)) for seed, req in enumerate(reqs, 1))
    return YES if apart == 0 else "outputs depend on each other"


def interleaved(subject: Subject) -> str:
    """A request, an unlike one and the first again, in turns: each gives the bytes that it gives alone."""
    plan = ((1, False), (2, True), (1, False))
    runner = PipelineRunner(subject.plain)
    reqs = [subject.requests(subject.plain, seed, second)[0] for seed, second in plan]
    running = [Execution(subject.plain, req, runner) for req in reqs]
    while running:
        running = [execution for execution in running if execution.advance()]
    apart = max(
        difference(arrays(req.outputs), subject.alone(seed, second))
        for req, (seed, second) in zip(reqs, plan, strict=True)
    )
    return YES if apart == 0 else "requests in turns disturb each other"


def cancelled(subject: Subject) -> str:
    """Closed after every number of units: no thread, no output and no tensor stays, and the next request is whole."""
    pipeline, expected = subject.plain, subject.alone(1)
    (req,) = subject.requests(pipeline, 1)
    with Execution(pipeline, req) as execution:
        steps = list(steps_of(execution))
    if not max(steps, default=0) or max(np.diff([0, *steps])) > 1:
        return "a unit is longer than a step"
    del req, execution
    before = live_tensors()
    for units in range(len(steps) + 1):
        (req,) = subject.requests(pipeline, 1)
        with Execution(pipeline, req) as execution:
            for _ in range(units):
                execution.advance()
        assert not req.outputs, "a request that was closed has an output"
        assert not step_threads(), "a closed request's thread is alive"
    del req, execution
    assert live_tensors() <= before, "a closed request's tensors are alive"
    (req,) = subject.requests(pipeline, 1)
    return YES if difference(finish(pipeline, req), expected) == 0 else "a closed request changes the next one"


def moved(subject: Subject) -> str:
    """Every tensor is another one after every unit."""
    if not subject.plain.movable:
        return UNMOVABLE
    (req,) = subject.requests(subject.plain, 1)
    with Execution(subject.plain, req) as execution:
        for _ in steps_of(execution):
            map_tensors(req, torch.clone)
    return YES if difference(arrays(req.outputs), subject.alone(1)) == 0 else "a moved request differs"


def compiled(subject: Subject) -> str:
    """Its repeated blocks are compiled."""
    pipeline = subject.load(compile="blocks")
    runner = PipelineRunner(pipeline)
    runner.finish_compiling()
    assert runner.form.mode == "compiled"
    return bounded(finish(pipeline, subject.requests(pipeline, 1)[0], runner), subject)


def offloaded(mode: str) -> Callable[[Subject], str]:
    """Return the column of an offload: with the least memory under which it fits, every component comes and goes."""

    def measure(subject: Subject) -> str:
        subject.load(LateMemory(), offload=mode, memory_limit=PLENTY)
        footprint = measure_memory(open_repository(subject.folder), subject.args(), {})
        limit = plan_mode(footprint, 0, mode, False).peak + WORKSPACE
        pipeline, seen = subject.load(LateMemory(), offload=mode, memory_limit=limit), Seen()
        watch_components(pipeline, seen)
        apart = difference(finish(pipeline, subject.requests(pipeline, 1)[0]), subject.alone(1))
        if not seen.brought:
            return "nothing comes or goes"
        return YES if apart == 0 else "an offloaded request differs"

    return measure


def cached(subject: Subject) -> str:
    """The second of two equal requests makes fewer calls, and the same bytes."""
    pipeline = subject.load(conditioning_cache="64MiB")
    runner, made = PipelineRunner(pipeline), count_forwards(pipeline)
    counts, apart = [], 0.0
    for _ in range(2):
        before = made[0]
        apart = max(apart, difference(finish(pipeline, subject.requests(pipeline, 1)[0], runner), subject.alone(1)))
        counts.append(made[0] - before)
    if apart:
        return "a request from the cache differs"
    return YES if counts[1] < counts[0] else "its encoders run again for an equal request"


def stacked(subject: Subject) -> str:
    """Two requests of other seeds, twice over: the second time their calls are made together."""
    pipeline = subject.load()
    finish(pipeline, subject.requests(pipeline, 1)[0])
    made, seeds = count_forwards(pipeline), (1, 2)
    finish(pipeline, subject.requests(pipeline, 1)[0])
    single, before, worst = made[0], made[0], 0.0
    for _ in range(2):
        before = made[0]
        reqs = [subject.requests(pipeline, seed)[0] for seed in seeds]
        for index, req in enumerate(reqs):
            req.request_id = f"r{index}"
        together(pipeline, reqs, "throughput")
        worst = max(difference(arrays(req.outputs), subject.alone(seed)) for seed, req in zip(seeds, reqs, strict=True))
    if worst > BOUND:
        return "stacked requests differ"
    return YES if made[0] - before < 2 * single else "its calls are made one by one"


def on_devices(subject: Subject) -> str:
    """Two devices, on processes of their own: which of the layouts it can have."""
    reasons, able = [], []
    for name, layout in LAYOUTS.items():
        try:
            layout_for(subject.args(**layout))
        except SafelightError as error:
            reasons.append(str(error))
            continue
        with DiffusionGenerator.from_pretrained(subject.folder, device="cpu", backend="diffusers", **layout) as engine:
            result = engine.generate(seed=1, output_type="np", **asked.fields(subject.tiny))
        if difference(media(result.outputs), subject.alone(1)) <= BOUND:
            able.append(name)
    return f"{YES}: {', '.join(able)}" if able else reasons[0] if reasons else "several devices make another picture"


def saved(subject: Subject) -> str:
    """What it makes is written to a file, and read again."""
    fields = {**asked.fields(subject.tiny), "seed": 1, "output_type": "pil"}
    result = DiffusionGenerator(subject.plain).generate(**fields)
    (output,) = result.outputs
    sounds = vars(output).get("sounds")  # of the one medium that not every version of the engine knows
    subject.expected(1)
    if subject.kinds & {"audio", "audios"} and not sounds:
        return "its sound is in no file"
    ending = "mp4" if output.videos else "wav" if sounds else "png"
    with tempfile.TemporaryDirectory() as folder:
        for path in result.save(Path(folder) / f"made.{ending}"):
            if ending == "mp4":
                whole = len(list(video.read_frames(path.read_bytes()))) == len(output.videos[0])
            elif ending == "png":
                with Image.open(path) as picture:
                    whole = picture.size == output.images[0].size
            else:
                whole = path.stat().st_size > 44
            if not whole:
                return "its file is not what was made"
    return YES


def media(outputs: list[GenerationOutput]) -> Any:
    """Return the arrays of outputs: pictures, videos and sounds."""
    return arrays([[each.images, each.videos, vars(each).get("sounds", [])] for each in outputs])


def bounded(made: Any, subject: Subject) -> str:
    """Say whether what was made is within the bound of what is made with everything off."""
    return YES if difference(made, subject.alone(1)) <= BOUND else "it is out of bounds"


@dataclass(frozen=True)
class Column:
    """One thing that is asked.

    Attributes:
        name: in the table.
        ask: says yes, or why not; what raises is a no with that error's words.
        slow: whether it is measured in `make test-all` alone.
        loads: whether it loads the pipeline anew, which takes longer than what it asks.

    """

    name: str
    ask: Callable[[Subject], str]
    slow: bool = False
    loads: bool = False

    def outcome(self, subject: Subject) -> str:
        """Return yes, or the reason why not."""
        try:
            with torch.random.fork_rng(devices=()):
                found = self.ask(subject)
        except AssertionError:
            raise
        except Exception as error:  # the table's boundary: it says what fails, and in which words
            kind = "" if isinstance(error, SafelightError) else f"{type(error).__name__}: "
            found = kind + one_line(str(error).replace(str(subject.folder), "the checkpoint"))
        assert not step_threads(), "a thread is left behind"
        return found.replace(subject.tiny.name, "it").replace("|", "/")


COLUMNS = (
    Column("equal", equal),
    Column("n=2", several),
    Column("interleaved", interleaved),
    Column("cancelled", cancelled),
    Column("moved", moved),
    Column("compiled", compiled, slow=True, loads=True),
    Column("offload, components", offloaded("components"), loads=True),
    Column("offload, blocks", offloaded("blocks"), loads=True),
    Column("cached", cached, loads=True),
    Column("stacked", stacked, loads=True),
    Column("devices", on_devices, slow=True),
    Column("saved", saved),
)
COLUMN = {column.name: column for column in COLUMNS}
