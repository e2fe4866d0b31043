"""The checks of `benchmarks.gpu_day` that are no tests: what a device has, and how its parts do beside the usual ones.

Each prints a table, and ends with 1 where a bound does not hold. On the CPU they run tiny, to show that they run.
"""

from __future__ import annotations

import argparse
import base64
import copy
import io
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Clock, as_safelight_calls, as_tensor, cpu_clock, interleaved, print_table, relative_error
from benchmarks.gpu import event_clock, size_of
from benchmarks.offload import SHARES, place
from benchmarks.stacks import STACKS, picture
from benchmarks.vae_decode import MODELS, latents_of, make_vae
from safelight.acceleration.activations import Valueless, count_peak, on_meta
from safelight.acceleration.apply import accelerate, cpu_routes
from safelight.acceleration.blocks import repeated_blocks
from safelight.acceleration.compile import (
    BlockClass,
    compile_blocks,
    compiling,
    in_form,
    missing_for_launchers,
    use_cache,
)
from safelight.acceleration.fused.fusion import fuse
from safelight.acceleration.graphs import StepGraphs
from safelight.acceleration.memory import CudaMemory, DeviceMemory
from safelight.acceleration.plan import WORKSPACE
from safelight.attention import BACKENDS, set_attention_backend
from safelight.attention.backends import AttentionKind, compute_capability, select_backend
from safelight.core.calls import CallKey, ModelCall
from safelight.core.model_runner import Forward
from safelight.errors import CompilationError
from safelight.layers.causal_vae import CausalDecoder
from safelight.layers.convolution import convolve_with_channels_last
from safelight.loading.vaes import run_vae
from tests.acceleration.memories import HostMemory

START_SECONDS = 120.0


class Machine:
    """Where a check runs.

    Args:
        device: `cuda` or `cpu`.

    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.on_gpu = device == "cuda"
        self.clock: Clock = event_clock if self.on_gpu else cpu_clock
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32

    def memory(self) -> DeviceMemory:
        """Return the device's memory."""
        return CudaMemory(self.device) if self.on_gpu else HostMemory()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def first_seconds(self, run: Callable[[], object]) -> float:
        """Return the seconds on the wall of something that runs for the first time."""
        self.synchronize()
        begun = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - begun


def environment(machine: Machine) -> bool:
    """Print versions and what building kernels needs; the allocator's limit holds."""
    import transformers

    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{os.cpu_count()} cores; to build launchers: {missing_for_launchers() or 'nothing is missing'}")
    if not machine.on_gpu:
        return True
    import triton

    properties = torch.cuda.get_device_properties(0)
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    print(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, cuDNN {cudnn}")
    print(f"triton {triton.__version__}")
    machine.memory().limit(2**30)
    try:
        torch.empty(2**31, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        return missing_for_launchers() is None
    print("the memory limit does not hold")
    return False


def fusion(machine: Machine) -> bool:
    """Fuse a block of each kind at its published width, cold; print what the check finds."""
    within = True
    for stack in STACKS.values():
        architecture = replace(stack.full.architecture, **{kind.field: 1 for kind in stack.blocks})
        transformer = stack.random_transformer(architecture, machine.dtype, machine.device.type)
        begun = time.perf_counter()
        report = fuse(transformer, machine.device, machine.dtype)
        print(f"{stack.name}, {time.perf_counter() - begun:.1f} s: {report}", flush=True)
        within &= report.num_fused > 0 and not report.num_plain
    return within


def attention(machine: Machine) -> bool:
    """Print what is chosen, the time of each kernel at real sizes, and what a length costs that is new."""
    for dtype in (torch.bfloat16, torch.float32):
        for has_mask in (False, True):
            backend = select_backend("auto", machine.device.type, dtype, has_mask, 128)
            print(f"{dtype}{', masked' if has_mask else ''}: {backend.name}")
    sizes = ((24, 4608, 4608), (24, 1536, 1536), (12, 32760, 32760), (12, 32760, 512))
    rows = []
    for heads, num_queries, num_keys in sizes if machine.on_gpu else ((2, 64, 64),):
        query, key, value = random_heads(machine, heads, num_queries, num_keys)
        kind = AttentionKind(machine.device.type, machine.dtype, False, 128, compute_capability(machine.device.type))
        sides = {
            name: partial(backend, query, key, value, None, False, None)
            for name, backend in BACKENDS.items()
            if backend.load is None and backend.refusal(kind) is None and name != "math"
        }
        with torch.inference_mode():
            seconds = interleaved(sides, 3, machine.clock)
        flops = 4 * heads * num_queries * num_keys * 128
        rows += [
            [f"{heads} heads, {num_queries} x {num_keys}", name, f"{each * 1e3:.3f}", f"{flops / each / 1e12:.0f}"]
            for name, each in seconds.items()
        ]
    print_table(["attention", "backend", "ms", "TFLOP/s"], rows)
    return True


def random_heads(machine: Machine, heads: int, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, as models give them: tokens before heads in memory."""
    query, key, value = (
        torch.randn(1, tokens, heads, 128, device=machine.device, dtype=machine.dtype).transpose(1, 2)
        for tokens in (num_queries, num_keys, num_keys)
    )
    return query, key, value


def new_lengths(machine: Machine) -> bool:
    """Print the milliseconds of the first and second call at six lengths, for cuDNN and flash attention.

    With TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1 in the environment torch keeps one plan of cuDNN's for all lengths.
    """
    avoid = os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE")
    rows = []
    for name in ("cudnn", "flash"):
        attend = BACKENDS[name]
        with torch.inference_mode():
            attend(*random_heads(machine, 24, 4200, 4200), None, False, None)
            for length in (4211, 4237, 4260, 4283, 4301, 4339):
                call = partial(attend, *random_heads(machine, 24, length, length), None, False, None)
                first, second = machine.first_seconds(call), machine.first_seconds(call)
                rows.append([name, str(avoid), str(length), f"{first * 1e3:.2f}", f"{second * 1e3:.2f}"])
    print_table(["backend", "avoids recompiling", "tokens", "first ms", "second ms"], rows)
    return True


def flux(machine: Machine, layers: str, fused: bool = True) -> nn.Module:
    """Return FLUX's transformer with random weights, as Safelight runs it."""
    stack = STACKS["flux"]
    size = size_of(stack, layers if machine.on_gpu else "tiny")
    transformer = stack.random_transformer(size.architecture, machine.dtype, machine.device.type)
    set_attention_backend(transformer, "auto", machine.device.type, machine.dtype)
    if fused:
        fuse(transformer, machine.device, machine.dtype)
    return transformer


def flux_inputs(machine: Machine, side: int) -> dict[str, Any]:
    """Return the arguments of a forward for a square picture."""
    stack = STACKS["flux"]
    size = stack.full if machine.on_gpu else stack.tiny
    grid = next(iter(picture(side if machine.on_gpu else side // 4).values()))
    return stack.inputs(size, grid, machine.dtype, machine.device.type).for_safelight()


def graphs(machine: Machine) -> bool:
    """Print forwards of FLUX at small sizes, eager and replayed; bytes are equal."""
    transformer, rows, equal = flux(machine, "full"), [], True
    for side in (256, 512):
        arguments = flux_inputs(machine, side)
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
        kwargs = {name: arguments[name] for name in names}
        call = ModelCall("transformer", kwargs, {"freqs_cis": arguments["freqs_cis"]}, (side,), CallKey("r", "cond", 0))
        eager = as_safelight_calls(transformer)

        def make(each: ModelCall, eager: Callable[..., Any] = eager) -> Tensor:
            return as_tensor(eager(**each.kwargs, **each.shared_kwargs))

        recorded = StepGraphs(machine.device)

        @torch.inference_mode()
        def replayed(each: ModelCall, recorded: StepGraphs = recorded, make: Callable[..., Tensor] = make) -> Any:
            return recorded([Forward(each, ())], lambda forwards: [make(one.call) for one in forwards])[0]

        made = [as_tensor(replayed(call)) for _ in range(4)]
        equal &= all(torch.equal(each, make(call)) for each in made)
        seconds = interleaved({"eager": partial(make, call), "graph": partial(replayed, call)}, 3, machine.clock)
        times = [f"{seconds[name] * 1e3:.2f}" for name in ("eager", "graph")]
        ratio = f"{seconds['eager'] / seconds['graph']:.2f}"
        rows.append([f"{side}x{side}", str(recorded.num_graphs), *times, ratio, f"{recorded.num_bytes / 2**20:.0f}"])
    print_table(["FLUX", "graphs", "ms eager", "ms replayed", "times faster", "MiB held"], rows)
    print(f"bytes are {'equal' if equal else 'NOT EQUAL'}")
    return equal


def compile_(machine: Machine) -> bool:
    """Print FLUX compiled as `compile="blocks"` does it, from a small picture, beside eager and Diffusers compiled."""
    use_cache()
    transformer = flux(machine, "full")
    classes, rows = compile_blocks(transformer), []
    forward = as_safelight_calls(transformer)
    small = flux_inputs(machine, 256)

    def build() -> None:
        with compiling(classes):
            forward(**small)

    print(f"compiled in {machine.first_seconds(build):.1f} s, from the smallest picture", flush=True)

    def run(form: Any, arguments: Mapping[str, Any]) -> Tensor:
        with in_form(classes, form):
            return as_tensor(forward(**arguments))

    reference = diffusers_compiled(machine, transformer)
    within = graphs_take(classes, partial(forward, **flux_inputs(machine, 512)))
    for side in (1024, 512):
        arguments = flux_inputs(machine, side)
        sides: dict[str, Callable[[], Tensor]] = {form: partial(run, form, arguments) for form in ("eager", "compiled")}
        if reference is not None:
            sides["Diffusers compiled"] = partial(reference, side)
        error = relative_error(sides["compiled"](), sides["eager"]())
        within &= error < 0.02
        seconds = interleaved(sides, 2, machine.clock)
        rows += [[f"{side}x{side}", name, f"{each * 1e3:.2f}", f"{error:.1e}"] for name, each in seconds.items()]
    print_table(["FLUX", "form", "ms a forward", "compiled from eager"], rows)
    return within


def graphs_take(classes: Sequence[BlockClass], run: Callable[[], object]) -> bool:
    """Say whether the compiled graphs take a call of another size; otherwise print the guard that they fail at.

    Where none takes it the blocks run eagerly, which times and pictures alone do not tell.
    """
    try:
        with torch.compiler.set_stance("fail_on_recompile"), compiling(classes):
            run()
    except CompilationError as error:
        print(f"NO GRAPH TAKES ANOTHER SIZE: {error.__cause__}")
        return False
    print("graphs take other sizes")
    return True


def diffusers_compiled(machine: Machine, transformer: nn.Module) -> Callable[[int], Tensor] | None:
    """Return Diffusers' transformer over the same weights, its blocks compiled, by the side of a picture."""
    if not machine.on_gpu:
        return None
    from diffusers import FluxTransformer2DModel

    stack, size = STACKS["flux"], STACKS["flux"].full
    with torch.device("meta"):
        reference = stack.diffusers_transformer(size.architecture, machine.dtype, "meta")
    assert isinstance(reference, FluxTransformer2DModel)
    reference.load_state_dict(transformer.state_dict(), assign=True)
    reference.compile_repeated_blocks(fullgraph=True, dynamic=True)

    def forward(side: int) -> Tensor:
        inputs = stack.inputs(size, next(iter(picture(side).values())), machine.dtype, "cuda")
        with torch.no_grad():
            return as_tensor(reference(**inputs.for_diffusers()))

    return forward


def decode(machine: Machine) -> bool:
    """Print decodes of pictures and videos, each way, beside Diffusers."""
    rows, within = [], True
    side = 1024 if machine.on_gpu else 64
    for name in ("AutoencoderKL", "Qwen-Image", "Wan 2.1"):
        model = replace(MODELS[name], num_frames=9 if name == "Wan 2.1" else 1)
        shape = (480, 832) if name == "Wan 2.1" and machine.on_gpu else (side, side)
        vae = make_vae(model, not machine.on_gpu, machine.dtype, machine.device.type)
        latents = latents_of(vae, model, shape[0], machine.dtype, machine.device.type)
        if shape[0] != shape[1]:
            latents = torch.randn(*latents.shape[:-1], shape[1] // model.scale).to(latents)
        sides = decode_sides(name, vae, machine)
        with torch.inference_mode():
            exact = sides["Diffusers"](latents)
            errors = {key: relative_error(decoded(latents), exact) for key, decoded in sides.items()}
            runs = {key: partial(decoded, latents) for key, decoded in sides.items()}
            seconds = interleaved(runs, 2, machine.clock)
        within &= max(errors.values()) < (0.05 if machine.dtype == torch.bfloat16 else 1e-4)
        made = f"{name}, {model.num_frames} of {shape[0]}x{shape[1]}"
        rows += [
            [made, key, f"{seconds[key] * 1e3:.1f}", f"{seconds[key] / seconds['Diffusers']:.2f}", f"{errors[key]:.1e}"]
            for key in sides
        ]
    print_table(["decode", "side", "ms", "of Diffusers", "difference"], rows)
    return within


def decode_sides(name: str, vae: Any, machine: Machine) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the ways of a decode; our own side is as the loader leaves it."""

    def library(module: Any) -> Callable[[Tensor], Tensor]:
        return lambda latents: as_tensor(module.decode(latents, return_dict=False))

    ours = copy.deepcopy(vae)
    accelerate(ours, "auto", machine.device, machine.dtype)
    run_vae(ours, cpu_plan=cpu_routes("auto", machine.device))
    sides = {"Diffusers": library(vae)}
    if name == "AutoencoderKL":
        last = copy.deepcopy(vae).to(memory_format=torch.channels_last)
        return {**sides, "channels last": library(last), "Safelight": library(ours)}
    decoder = CausalDecoder(ours)

    def frames(latents: Tensor) -> Tensor:
        cache: dict[str, list[Any]] = {}
        made = [f for index in range(latents.shape[2]) for f in decoder.decode(latents[:, :, [index]], cache)]
        return torch.stack(made, dim=2)

    return {**sides, "Safelight": frames}


def offload(machine: Machine) -> bool:
    """Print a few of FLUX's blocks, resident and streaming: equal bytes, and bytes a second."""
    transformer = flux(machine, "4,8", fused=False).cpu()
    if not machine.on_gpu:
        transformer = flux(machine, "tiny", fused=False)
    arguments = flux_inputs(machine, 1024)
    forward = partial(as_safelight_calls(transformer), **arguments)
    rows, equal, resident, wanted = [], True, 0.0, None
    for share in (0.0, *SHARES):
        placed, stream = place(transformer, share, machine.memory())
        entered = machine.first_seconds(placed.enter)
        made = as_tensor(forward()).cpu()
        before = 0 if stream is None else stream.bytes_copied
        forward()
        copied = 0 if stream is None else stream.bytes_copied - before
        seconds = interleaved({"forward": forward}, 2, machine.clock)["forward"]
        wanted, resident = (made, seconds) if wanted is None else (wanted, resident)
        equal &= torch.equal(made, wanted)
        speed = f"{placed.num_bytes / entered / 1e9:.1f}"
        times = [f"{seconds * 1e3:.1f}", f"{seconds / resident:.2f}", f"{copied / seconds / 1e9:.1f}"]
        rows.append([f"{share:.0%} of {len(repeated_blocks(transformer))}", speed, *times])
        placed.leave()
    print_table(["blocks that stream", "GB/s to enter", "ms a forward", "of resident", "GB/s streamed"], rows)
    print(f"bytes are {'equal' if equal else 'NOT EQUAL'}")
    return equal


def memory(machine: Machine) -> bool:
    """Print what forwards and decodes take beside what is counted on the meta device."""
    rows, within = [], True
    transformer, arguments = flux(machine, "2,2"), flux_inputs(machine, 1024)
    with Valueless():
        empty = STACKS["flux"].random_transformer(size_of(STACKS["flux"], "2,2").architecture, machine.dtype, "meta")
        given = {name: on_meta(tensor) for name, tensor in arguments.items()}
        counted = count_peak(lambda: empty(**given))
    cases = {"FLUX forward, 1024x1024": (counted, partial(as_safelight_calls(transformer), **arguments))}
    for name in ("AutoencoderKL", "Qwen-Image"):
        vae = make_vae(MODELS[name], False, machine.dtype, "cuda")
        convolve_with_channels_last(vae)
        latents = latents_of(vae, MODELS[name], 1024, machine.dtype, "cuda")
        meta = make_vae(MODELS[name], False, machine.dtype, "meta")
        counted = count_peak(
            lambda meta=meta, latents=latents: meta.decode(on_meta(latents), return_dict=False)  # type: ignore[misc]
        )
        cases[f"{name} decode, 1024x1024"] = (counted, partial(vae.decode, latents, return_dict=False))
    total = torch.cuda.get_device_properties(0).total_memory
    for name, (counted, run) in cases.items():
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
        torch.cuda.reset_peak_memory_stats()
        # Nothing else is left than what a plan would leave.
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + counted + WORKSPACE) / total)
        fits = True
        try:
            with torch.inference_mode():
                run()
        except torch.OutOfMemoryError:
            fits = False
        torch.cuda.synchronize()
        torch.cuda.set_per_process_memory_fraction(1.0)
        taken, driver = torch.cuda.max_memory_allocated() - before, free - torch.cuda.mem_get_info()[0]
        within &= fits
        shown = (f"{value / 2**20:,.0f}" for value in (counted, taken, driver))
        rows.append([name, *shown, "yes" if fits else "NO"])
    print_table(["MiB", "counted", "allocated", "of the driver's", "fits into the limit"], rows)
    return within


def server(machine: Machine) -> bool:
    """Serve the shipped model; a picture over HTTP is the one that is made in this process."""
    import httpx
    from PIL import Image

    from safelight import DiffusionGenerator
    from tests.live_server import free_port

    port, prompt = free_port(), "a large red circle at the left on a white background"
    command = [sys.executable, "-P", "-m", "safelight.cli.main", "serve", "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--device", machine.device.type, "--state-dir", str(Path(folder) / "state")]
        begun = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                while not is_ready(http):
                    if process.poll() is not None or time.monotonic() > begun + START_SECONDS:
                        print("the server did not become ready")
                        return False
                    time.sleep(0.1)
                print(f"ready after {time.monotonic() - begun:.1f} s")
                asked = {"prompt": prompt, "seed": 7, "n": 2}
                answered = http.post("/v1/images/generations", json=asked).raise_for_status().json()
                begun = time.monotonic()
                http.post("/v1/images/generations", json=asked).raise_for_status()
                print(f"two pictures in {time.monotonic() - begun:.3f} s")
        finally:
            process.terminate()
            process.wait(60)
    pictures = [Image.open(io.BytesIO(base64.b64decode(each["b64_json"]))) for each in answered["data"]]
    with DiffusionGenerator.from_pretrained(device=machine.device.type) as generator:
        alone = generator.generate(prompt, seed=7, n=2).images
    equal = all(one.tobytes() == other.tobytes() for one, other in zip(pictures, alone, strict=True))
    print(f"pictures over HTTP and in process are {'equal' if equal else 'NOT EQUAL'}; exit {process.returncode}")
    return equal and process.returncode == 0


def is_ready(http: Any) -> bool:
    """Say whether a server answers that it is ready."""
    import httpx

    try:
        return bool(http.get("/readyz").status_code == 200)
    except httpx.TransportError:
        return False


CHECKS: Mapping[str, Callable[[Machine], bool]] = {
    "environment": environment,
    "fusion": fusion,
    "attention": attention,
    "new_lengths": new_lengths,
    "graphs": graphs,
    "compile": compile_,
    "decode": decode,
    "offload": offload,
    "memory": memory,
    "server": server,
}


def main() -> int:
    """Run one check; return 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    return int(not CHECKS[arguments.check](Machine(arguments.device)))


if __name__ == "__main__":
    sys.exit(main())
