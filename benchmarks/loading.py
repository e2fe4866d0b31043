"""Loading a 1.3 GB transformer in five shards, first touch of every weight included, beside Diffusers.

Each load runs in a fresh process; libraries are imported before its clock starts. The files are in the page cache, and
this process maps them too: what a loader only maps is then shared memory, and what it copies is private.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import mmap
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import begin, print_table
from benchmarks.stacks import STACKS
from safelight.families.flux.transformer import FluxArchitecture

LARGE = FluxArchitecture(num_layers=4, num_single_layers=8, num_attention_heads=12, guidance_embeds=True)
SMALL = FluxArchitecture(num_layers=4, num_single_layers=8, num_attention_heads=4, guidance_embeds=True)
TINY = FluxArchitecture(num_layers=1, num_single_layers=1, num_attention_heads=1)
"""Loaded once before the clock starts, so that no first import counts."""
NUM_SHARDS = 5
PAGE = 4096
TIME_TARGET, MEMORY_TARGET = 4.0, 0.05


@dataclass(frozen=True)
class Measurement:
    """One load.

    Attributes:
        cpu, wall: seconds.
        private: bytes of memory that this process alone has, more than before the load.

    """

    cpu: float
    wall: float
    private: int


def load_diffusers(folder: Path) -> Any:
    """Load as Diffusers does by default; how depends on whether `accelerate` is installed."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


def load_ours(folder: Path) -> Any:
    """Load as Safelight does."""
    from safelight.loading.classes import Source
    from safelight.loading.components import load_component

    source = Source(folder, "safelight.families.flux.transformer:FluxTransformer2DModel")
    return load_component(source, torch.bfloat16, torch.device("cpu"))


LOADERS: dict[str, Callable[[Path], Any]] = {"Diffusers": load_diffusers, "Safelight": load_ours}


def touch(weights: Iterable[Tensor]) -> None:
    """Read one element of every page."""
    for tensor in weights:
        tensor.view(-1)[:: PAGE // tensor.element_size()].sum()


def private_bytes() -> int:
    """Return the memory that belongs to this process alone, as Linux counts it."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def measure_here(side: str, folder: Path) -> Measurement:
    """Load once in this process."""
    import diffusers  # noqa: F401 - imports are start-up, not loading

    import safelight.families.flux.transformer
    import safelight.loading.components  # noqa: F401

    load = LOADERS[side]
    with tempfile.TemporaryDirectory() as warm_up:
        STACKS["flux"].diffusers_transformer(TINY, torch.bfloat16).save_pretrained(warm_up)
        load(Path(warm_up))
    before, cpu, wall = private_bytes(), time.process_time(), time.perf_counter()
    model = load(folder)
    touch(model.state_dict().values())
    return Measurement(time.process_time() - cpu, time.perf_counter() - wall, private_bytes() - before)


def measure_in_child(side: str, folder: Path) -> Measurement:
    """Load once in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loading", "--child", side, "--folder", str(folder)]
    child = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return Measurement(**json.loads(child.stdout.splitlines()[-1]))


def build(folder: Path, architecture: FluxArchitecture) -> int:
    """Save a transformer in five shards, and return its bytes."""
    model = STACKS["flux"].diffusers_transformer(architecture, torch.bfloat16)
    num_bytes: int = sum(tensor.nbytes for tensor in model.state_dict().values())
    # No shard is filled to the last byte, so that a fifth of all would make six.
    model.save_pretrained(folder, max_shard_size=int(num_bytes / NUM_SHARDS * 1.05))
    assert len(list(folder.glob("*.safetensors"))) == NUM_SHARDS
    return num_bytes


def map_files(folder: Path) -> list[mmap.mmap]:
    """Map every shard and read each of its pages, as a second user of the model would."""
    mapped = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            mapped.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        mapped[-1][::PAGE]
    return mapped


def report(samples: dict[str, list[Measurement]], num_bytes: int) -> None:
    """Print medians."""
    rows, times = [], {}
    for side, measured in samples.items():
        times[side] = statistics.median(one.cpu for one in measured)
        wall = statistics.median(one.wall for one in measured)
        private = statistics.median(one.private for one in measured)
        memory = f"{private / 1e6:.0f} MB ({private / num_bytes:.1%})"
        rows.append([side, f"{times[side] * 1000:.0f} ms", f"{wall * 1000:.0f} ms", memory])
    accelerate = "with" if importlib.util.find_spec("accelerate") else "without"
    print(f"{num_bytes / 1e9:.2f} GB in {NUM_SHARDS} shards, warm page cache, Diffusers {accelerate} accelerate")
    print_table(["", "CPU time", "wall time", "private memory (of the weights)"], rows)
    ratio = times["Diffusers"] / times["Safelight"]
    print(f"{ratio:.1f} times faster; {TIME_TARGET:.0f} times, and at most {MEMORY_TARGET:.0%} private, are wanted")


def main() -> None:
    """Measure both sides, A B B A, each time in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of A B B A")
    parser.add_argument("--child", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = begin(parser)
    if arguments.child:
        print(json.dumps(asdict(measure_here(arguments.child, arguments.folder))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_bytes = build(folder, SMALL if arguments.quick else LARGE)
        mapped = map_files(folder)
        samples: dict[str, list[Measurement]] = {side: [] for side in LOADERS}
        for _ in range(1 if arguments.quick else arguments.rounds):
            for side in (*LOADERS, *reversed(LOADERS)):
                samples[side].append(measure_in_child(side, folder))
        for mapping in mapped:
            mapping.close()
    report(samples, num_bytes)


if __name__ == "__main__":
    main()
