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
from safelight.serving.http_args import HTTPArgs
from tests.budgets import FAMILIES, FAMILY_NAMES, FILES, FUNCTIONS, OVER, SOURCE, TREES, all_budgets, code_lines


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
    "layers": {"errors", "layers", "attention"},
    "attention": {"errors", "attention"},
    "families": {"errors", "core", "stages", "layers", "attention", "families"},
    "backends": {"errors", "attention", "clips", "core", "backends"},
    "acceleration": {"errors", "core", "stages", "layers", "attention", "parallel", "preparation", "acceleration"},
    "parallel": {"errors", "core", "stages", "layers", "attention", "parallel"},
    "loading": {"errors", "core", "stages", "layers", "attention", "acceleration", "backends", "parallel", "loading"},
    "file_kinds": set(),
    "encoded": set(),
    "media": {"encoded", "errors", "file_kinds", "version"},
    "clips": {"encoded", "errors", "core", "media"},
    "video": {"errors", "core", "media"},
    "results": {"errors", "core", "media", "video"},
    "preparation": {"errors", "clips", "core", "media"},
    "client": {"errors", "clips", "core", "media", "results", "runtime"},
    "generator": {"errors", "client", "core", "loading", "preparation", "results", "runtime"},
    "runtime": {
        "clips",
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
        "results",
        "runtime",
    },
    "serving": {"errors", "version", "core", "loading", "media", "video", "parallel", "preparation", "runtime"}
    | {"clips", "encoded", "file_kinds", "serving"},
    "checking": {"errors", "core", "backends", "layers", "loading", "preparation", "runtime", "checking"},
    "testing": {"errors", "core", "checking", "loading", "runtime", "testing"},
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


def test_a_worker_and_what_watches_it_know_each_other_by_messages():
    """Neither folder imports the other: what both need lies beside them."""
    sides = ("safelight.runtime.worker", "safelight.runtime.supervisor")
    for own, other in (sides, sides[::-1]):
        for name, targets in GRAPH.items():
            assert not name.startswith(own) or not [target for target in targets if target.startswith(other)], name


def test_core_stages_import_only_the_contracts():
    """Stages and core know each other through contracts alone: only the composed pipeline imports stages."""
    importers = {
        name for name, targets in GRAPH.items() if any(target.startswith("safelight.stages") for target in targets)
    }
    assert {name for name in importers if part(name) == "core"} == {"safelight.core.pipeline"}


LIBRARY_VAE = re.compile(r'"(?:diffusers:)?AutoencoderKL\w+"')
"""A library's class, which tables of its classes name as it is named there."""


def pipelines_of(family: str) -> list[str]:
    return [name for name, entry in pipelines().items() if entry.model_family == family]


def names_of(family: str) -> re.Pattern[str]:
    """Return a pattern of a family's name: as a word, in capitals, and as it and its pipelines begin class names."""
    camel = "".join(part.capitalize() for part in family.split("_"))
    prefix = min(pipelines_of(family), key=len).removesuffix("Pipeline")
    word = rf"(?<![A-Za-z]){family}(?![A-Za-z])|{family.upper()}"
    return re.compile(rf"{word}|(?:{camel}|{prefix})(?![a-z])")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_nothing_outside_a_family_names_it(family):
    pattern = names_of(family)
    for name in (*pipelines_of(family), f"safelight.families.{family}.params", f"{family.upper()}_SIZES"):
        assert pattern.search(name), f"{name} would not be found"
    others = [path for path in FILES if FAMILIES / family not in path.parents]
    assert [path for path in others if pattern.search(LIBRARY_VAE.sub("", path.read_text()))] == []


COMMON = set(SamplingParams.__dataclass_fields__)
PIECES = {SOURCE / "core" / "shared_params.py", SOURCE / "stages" / "packed_latents.py"}
OWN_OPTIONS = {name for entry in pipelines().values() for name in entry.sampling_param_cls().options()} - COMMON
OF_THE_CONTRACT = OWN_OPTIONS & set(Req.__dataclass_fields__)
"""Fields of a request and of the solver as well: `batch.sigmas` is one of these, and `params.sigmas` is not."""
OTHERWISE = {
    ("stages/timestep_preparation.py", "sigmas"): "an argument of the solver",
    ("stages/timestep_preparation.py", "timesteps"): "an argument of the solver",
    **{
        (file, name): "an argument of the solver"
        for file in ("core/solver_names.py", "core/solver.py", "backends/demands.py")
        for name in ("sigmas", "timesteps")
    },
    ("testing/report.py", "sigmas"): "a column: what the solver was set to",
    **{
        (f"checking/{file}", name): "a row: what the solver was set to"
        for file in ("ours.py", "reference.py")
        for name in ("sigmas", "timesteps")
    },
}
"""Where a string that is an option's name of some family means something else."""


def words(node: ast.AST) -> list[str]:
    """Return what a node of a syntax tree names: identifiers that are no local variable of another meaning, strings."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.Attribute):
        of_params = ast.unparse(node.value).endswith("params")
        return [] if node.attr in OF_THE_CONTRACT and not of_params else [node.attr]
    name = {ast.Name: "id", ast.arg: "arg", ast.keyword: "arg"}.get(type(node))
    found = getattr(node, name) if name else None
    return [] if found is None or found in OF_THE_CONTRACT | {"layers"} else [found]


def test_shared_code_knows_no_field_of_a_family():
    """What only families declare stands in no file but theirs, and in the pieces that they choose."""
    assert {"max_area", "true_cfg_scale", "sigmas", "guidance_scale_2", "layers"} <= OWN_OPTIONS
    shared = [path for path in FILES if FAMILIES not in path.parents and path not in PIECES]
    places = {
        (path.relative_to(SOURCE).as_posix(), word)
        for path in shared
        for node in ast.walk(TREES[path])
        for word in words(node)
        if word in OWN_OPTIONS
    }
    assert places == OTHERWISE.keys()


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
    "safelight.runtime.supervisor.replicas",
    "safelight.runtime.supervisor.supervisor",
    "safelight.serving.server",
    "safelight.cli.serve",
    "safelight.core.options",
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


@pytest.mark.parametrize("budget", all_budgets(), ids=lambda budget: budget.name)
def test_budgets(budget):
    """How full each is stands at the end of the tests' output."""
    assert budget.used() <= OVER * budget.lines, budget.line()


def test_every_file_is_in_one_budget():
    """A new folder has a budget, with its reason."""
    for path in FILES:
        assert len([budget for budget in all_budgets() if budget.holds(path)]) == 1, path


BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.IfExp, ast.ExceptHandler, ast.comprehension, ast.match_case)


def num_branches(function: ast.AST) -> int:
    """Return how many ways lead through a function, as McCabe counts them."""
    nodes = list(ast.walk(function))
    operands = sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    return 1 + sum(isinstance(node, BRANCHES) for node in nodes) + operands


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SOURCE)) for path in FILES])
def test_sizes_of_files_and_functions(path):
    assert code_lines(path) <= (500 if path.name == "transformer.py" else 400)
    for node in ast.walk(TREES[path]):
        if isinstance(node, FUNCTIONS):
            assert (node.end_lineno or 0) - node.lineno + 1 <= 80, node.name
            assert num_branches(node) <= 15, node.name
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
    "prompt negative_prompt image height width num_frames fps num_inference_steps guidance_scale seed n scheduler "
    "output_type"
)
REQ_FIELDS = (
    "request_id params output_index model stage latents timesteps num_inference_steps step_index sigmas prompt_embeds "
    "negative_prompt_embeds prompt_embeds_mask negative_prompt_embeds_mask image_latents image_embeds generator "
    "raw_latent_shape scheduler cond pending "
    "denoised outputs warnings timings stage_state host_tensors"
)
HTTP_ARGS = (
    "host port state_dir api_key_file served_model_name public_url allowed_origins allowed_hosts response_format "
    "replicas max_running max_waiting max_cost max_tokens batching share warm_up keep_hours max_storage drain_seconds "
    "unit_limit first_unit_limit heartbeat_limit"
)
SERVER_ARGS = (
    "model revision variant pipeline component device dtype component_dtypes backend attention_backend kernels offload "
    "memory_limit compile cuda_graphs devices cfg_parallel_size ring_degree ulysses_degree tp_size vae_parallel "
    "vae_tiling conditioning_cache"
)


@pytest.mark.parametrize(
    ("cls", "fields", "limit"),
    [
        (SamplingParams, COMMON_FIELDS, 20),
        (Req, REQ_FIELDS, 28),
        (ServerArgs, SERVER_ARGS, 27),
        (HTTPArgs, HTTP_ARGS, 25),
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


TESTS = Path(__file__).parent
WITHOUT_TEST = """
core/tenant.py
serving/jobs/limits.py serving/jobs/store.py
version.py
"""
"""Source files without a test at their path: they say what there is, and do nothing."""
HELPERS_IN_TESTS: set[str] = set()
"""Test modules from which others import, as they were when the rule was made."""


def expected_test(path: Path) -> Path:
    """Return where the test of a source file is: at the file's own path."""
    place = path.relative_to(SOURCE)
    return TESTS / place.with_name(f"test_{place.name}")


def test_a_files_test_is_at_its_path():
    """The list shrinks: who writes a test, or moves a file, takes its line out. Nothing is added."""
    own = {FAMILIES, SOURCE / "testing"}  # tested by suites, and suites themselves
    untested = {
        path.relative_to(SOURCE).as_posix()
        for path in FILES
        if path.name != "__init__.py" and not own & set(path.parents) and not expected_test(path).exists()
    }
    listed = set(WITHOUT_TEST.split())
    assert untested - listed == set(), "write their tests at their paths"
    assert listed - untested == set(), "they have tests, or are gone: take them out of WITHOUT_TEST"


def test_helpers_are_in_helper_modules():
    """No test module imports from another one: what two need lies in a module that is no test. The list shrinks."""
    found = set()
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name for name in modules if re.fullmatch(r"tests\.(\w+\.)*test_\w+", name)}
    assert found - HELPERS_IN_TESTS == set(), "move what others need into a helper module"
    assert HELPERS_IN_TESTS - found == set(), "nobody imports from them: take them out of HELPERS_IN_TESTS"
