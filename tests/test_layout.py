"""The tree keeps the rules of the design: who names whom, who imports what, and how large things are."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from safelight.core.params import SamplingParams
from safelight.core.registry import pipelines
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.serving.serve_args import ServeArgs

SOURCE = Path(__file__).parents[1] / "src" / "safelight"
FAMILIES = SOURCE / "families"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
FAMILY_NAMES = sorted(path.name for path in FAMILIES.iterdir() if path.is_dir() and not path.name.startswith("_"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def module_name(path: Path) -> str:
    dotted = ".".join(("safelight", *path.relative_to(SOURCE).with_suffix("").parts))
    return dotted.removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, inside functions too, but not for type checking alone."""
    found = set()
    for node in walk_runtime(TREES[path]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                found.add(name)
    return found - {module_name(path)}


def walk_runtime(tree: ast.AST):
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from walk_runtime(child)


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def test_no_import_cycles():
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in GRAPH[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


LAYERS = {
    "errors": set(),
    "version": set(),
    "core": {"errors", "core", "stages", "families"},
    "stages": {"errors", "core", "stages", "layers", "attention"},
    "layers": {"errors", "layers"},
    "attention": {"errors", "attention"},
    "families": {"errors", "core", "stages", "layers", "attention", "families"},
    "backends": {"errors", "core", "backends"},
    "acceleration": {"errors", "core", "stages", "layers", "attention", "parallel", "preparation", "acceleration"},
    "parallel": {"errors", "core", "stages", "layers", "attention", "parallel"},
    "loading": {"errors", "core", "attention", "acceleration", "backends", "parallel", "loading"},
    "file_kinds": set(),
    "encoded": set(),
    "media": {"encoded", "errors", "file_kinds", "version"},
    "video": {"errors", "media"},
    "results": {"errors", "core", "media", "video"},
    "preparation": {"errors", "core", "media"},
    "client": {"errors", "core", "results", "runtime"},
    "group_engine": {"errors", "core", "results", "runtime"},
    "generator": {"errors", "acceleration", "client", "core", "group_engine", "loading", "preparation", "results"},
    "runtime": {
        "encoded",
        "errors",
        "version",
        "acceleration",
        "attention",
        "parallel",
        "core",
        "loading",
        "media",
        "preparation",
        "runtime",
    },
    "serving": {"errors", "version", "core", "loading", "media", "video", "parallel", "preparation", "runtime"}
    | {"encoded", "file_kinds", "serving"},
    "checking": {"errors", "core", "backends", "layers", "loading", "generator", "preparation", "checking"},
    "cli": {"errors", "version", "core", "loading", "media", "video", "results", "preparation"}
    | {"acceleration", "client", "generator", "checking", "parallel", "runtime", "serving", "cli"},
}
"""For each part, the parts that it may import."""


def part(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "safelight"])
def test_imports_point_one_way(module):
    allowed = LAYERS[part(module)]
    wrong = {target for target in GRAPH[module] if target != "safelight" and part(target) not in allowed}
    assert not wrong


def test_core_stages_import_only_the_contracts():
    """Stages and core know each other through contracts alone: only the composed pipeline imports stages."""
    importers = {
        name for name, targets in GRAPH.items() if any(target.startswith("safelight.stages") for target in targets)
    }
    assert {name for name in importers if part(name) == "core"} == {"safelight.core.pipeline"}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_nothing_outside_a_family_names_it(family):
    pattern = re.compile(rf"(?<![A-Za-z]){family}(?![A-Za-z])|{family.capitalize()}(?![a-z])|{family.upper()}")
    naming = [path for path in FILES if FAMILIES / family not in path.parents and pattern.search(path.read_text())]
    assert naming == []


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_families_do_not_import_each_other(family):
    own = f"safelight.families.{family}"
    for name, targets in GRAPH.items():
        if name.startswith(own):
            assert not [t for t in targets if t.startswith("safelight.families.") and not t.startswith(own)]


TORCHLESS = [
    "safelight",
    "safelight.errors",
    "safelight.media",
    "safelight.video",
    "safelight.preparation",
    "safelight.client",
    "safelight.runtime.client",
    "safelight.runtime.supervisor",
    "safelight.serving.server",
    "safelight.cli.serve",
    "safelight.core.params",
    "safelight.core.schema",
    "safelight.core.registry",
    "safelight.core.server_args",
    "safelight.core.byte_sizes",
    "safelight.loading.repository",
    "safelight.loading.hub",
    "safelight.cli.check",
    "safelight.cli.main",
    "safelight.cli.plan",
    "safelight.cli.generate",
    "safelight.cli.inspect",
    "safelight.cli.options",
    *(f"safelight.families.{family}.params" for family in FAMILY_NAMES),
]


def test_no_torch_where_there_must_be_none():
    """One process imports all of them, lists the pipelines and their parameters, and has no torch."""
    script = (
        f"import sys, importlib; [importlib.import_module(name) for name in {TORCHLESS!r}];"
        "from safelight.core.registry import pipelines;"
        "[entry.sampling_param_cls().options() for entry in pipelines().values()];"
        "heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)


def test_what_computes_needs_torch_alone():
    """Measured on machines that have neither Diffusers nor what a server is made of."""
    script = (
        "import importlib, pkgutil, sys;"
        "sys.modules.update(dict.fromkeys(['diffusers', 'av', 'zmq', 'msgspec', 'fastapi', 'uvicorn', 'starlette']));"
        "parts = [importlib.import_module(f'safelight.{name}') for name in "
        "('core', 'stages', 'layers', 'attention', 'families', 'acceleration')];"
        "[importlib.import_module(module.name) for part in parts"
        " for module in pkgutil.walk_packages(part.__path__, f'{part.__name__}.')]"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=240)


def code_lines(path: Path) -> int:
    tree, docs = TREES[path], set()
    for node in ast.walk(tree):
        if (
            isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module))
            and ast.get_docstring(node, clean=False) is not None
        ):
            docs |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(1 for n, line in lines if line.strip() and not line.lstrip().startswith("#") and n not in docs)


BUDGETS = {
    "core": 1400,
    "stages": 900,
    "layers": 800,
    "attention": 400,
    "loading": 1400,
    "backends": 800,
    "parallel": 1200,
    "acceleration": 3000,
    "checking": 1500,
    "cli": 800,
    "generator.py": 300,
    "runtime": 2500,
    "serving": 4200,
}
OVER = 1.25
"""A budget is a habit: what is over is printed, and fails at this factor."""


def total(folder: Path) -> int:
    return sum(code_lines(path) for path in FILES if path == folder or folder in path.parents)


def check_budget(name: str, lines: int, budget: int) -> None:
    if lines > budget:
        print(f"{name}: {lines} code lines, budget {budget}")
    assert lines <= OVER * budget


@pytest.mark.parametrize(("name", "budget"), BUDGETS.items())
def test_budgets(name, budget):
    check_budget(name, total(SOURCE / name), budget)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_family_budgets(family):
    """900 code lines for one or two pipeline classes, 150 for each further one; a transformer has 500."""
    classes = [entry for entry in pipelines().values() if entry.model_family == family]
    own = 1400 if (FAMILIES / family / "vae.py").exists() else 900
    if any("V" in entry.pipeline_config_cls().task for entry in classes):
        own = 1600
    check_budget(family, total(FAMILIES / family), own + 150 * max(0, len(classes) - 2))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SOURCE)) for path in FILES])
def test_sizes_of_files_and_functions(path):
    assert code_lines(path) <= (500 if path.name == "transformer.py" else 400)
    for node in ast.walk(TREES[path]):
        if isinstance(node, FUNCTIONS):
            assert (node.end_lineno or 0) - node.lineno + 1 <= 80, node.name
            if node.name == "forward" and FAMILIES in path.parents:
                assert (node.end_lineno or 0) - node.lineno + 1 <= 40, "forward reads as the paper does"


def test_no_context_manager_spans_a_yield():
    """Whoever drives a pipeline's generator may close it anywhere, in any order."""
    for path, tree in TREES.items():
        if part(module_name(path)) not in ("core", "stages", "families") or path.name == "executor.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.With | ast.AsyncWith):
                assert not [n for n in ast.walk(node) if isinstance(n, ast.Yield | ast.YieldFrom)], path


STARTING = {"subprocess.Popen", "subprocess.run", "asyncio.create_subprocess_exec", "asyncio.create_subprocess_shell"}


def test_nothing_runs_code_from_data():
    """No pickle, no torch.load, no eval, no trust_remote_code."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "cloudpickle", "dill", "marshal", "shelve"} & set(names), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "yaml.load", "compile"), (path, called)
                assert not [k for k in node.keywords if k.arg == "trust_remote_code"], path


def test_processes_are_started_in_one_way():
    """Whoever starts a Python asks `runtime/processes.py`, which keeps the working directory out of its path."""
    for path, tree in TREES.items():
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "executable"]
        assert not found or path.name == "processes.py", path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in STARTING:
                assert "env" in {keyword.arg for keyword in node.keywords}, path


def test_models_know_no_technique():
    """A transformer's file imports layers and attention, nothing of parallelism, compile, offload or caching."""
    for family in FAMILY_NAMES:
        targets = GRAPH[f"safelight.families.{family}.transformer"]
        assert {part(target) for target in targets if target != "safelight"} <= {"attention", "layers"}
        assert "compile" not in (FAMILIES / family / "transformer.py").read_text()


COMMON_FIELDS = (
    "prompt negative_prompt image height width num_frames fps num_inference_steps guidance_scale seed n output_type"
)
REQ_FIELDS = (
    "request_id params stage latents timesteps num_inference_steps step_index sigmas prompt_embeds "
    "negative_prompt_embeds image_latents image_embeds generator raw_latent_shape scheduler cond pending "
    "denoised outputs warnings timings feature_cache host_tensors"
)
SERVE_ARGS = (
    "host port state_dir api_key_file served_model_name public_url allowed_origins allowed_hosts response_format "
    "replicas max_running max_waiting max_cost max_tokens batching share warm_up keep_hours max_storage drain_seconds "
    "unit_limit first_unit_limit heartbeat_limit"
)
SERVER_ARGS = (
    "model revision variant device dtype component_dtypes backend attention_backend kernels offload memory_limit "
    "compile cuda_graphs devices cfg_parallel_size ring_degree ulysses_degree tp_size vae_parallel vae_tiling "
    "conditioning_cache"
)


@pytest.mark.parametrize(
    ("cls", "fields", "limit"),
    [
        (SamplingParams, COMMON_FIELDS, 20),
        (Req, REQ_FIELDS, 25),
        (ServerArgs, SERVER_ARGS, 25),
        (ServeArgs, SERVE_ARGS, 25),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_frozen_lists(cls, fields, limit):
    """A new option, or a new field of a request, is argued for in its commit: this list changes with it."""
    names = [field.name for field in dataclasses.fields(cls)]
    assert names == fields.split()
    assert len(names) <= limit


READ_BY = ("generate.py", "compile.py", "torchrun.py", "processes.py")
ENVIRONMENT_VARIABLES = {"SAFELIGHT_STATE_DIR", "SAFELIGHT_API_KEY_FILE"}


def test_environment_variables_are_few():
    """At most five, each for a setting that a flag names as well; Inductor and torch's allocator have their own."""
    found = set()
    for path in FILES:
        found |= set(re.findall(r"SAFELIGHT_[A-Z_]+", path.read_text()))
        assert "getenv" not in path.read_text(), path
        assert "os.environ" not in path.read_text() or path.name in READ_BY, path
    assert found == ENVIRONMENT_VARIABLES and len(found) <= 5
