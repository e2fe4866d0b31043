"""What is installed: ranges for users, exact versions for the two commands, and both ends of the ranges."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
MOST_DEPENDENCIES = 22
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = [Requirement(line) for line in PROJECT["dependencies"]]
OF_TESTS = [Requirement(line) for line in PROJECT["optional-dependencies"]["test"]]
LINES = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]


def load_tool():
    spec = importlib.util.spec_from_file_location("requirements", ROOT / "tools" / "requirements.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


LEAST_SAFE = {
    "diffusers": (
        "0.42.1",
        "a component's library in an index could bring code of the repository (GHSA-4prv-5hj7-c2xr)",
    ),
    "fastapi": ("0.133", "earlier ones admit no Starlette that is safe"),
    "h11": ("0.16", "takes malformed chunked bodies: one request smuggled in another (CVE-2025-43859)"),
    "pillow": ("12.3", "writes beyond its memory, and decompresses without end (advisories of 2026)"),
    "python-multipart": (
        "0.0.31",
        "quadratic and unbounded headers, preambles, names (CVE-2026-40347, -42561, -53539)",
    ),
    "starlette": ("1.3.1", "Host, paths, ranges and forms (CVE-2025-62727, CVE-2026-48710, PYSEC-2026-248 and -249)"),
    "transformers": ("5.3", "a nested configuration could bring code of the repository (CVE-2026-5241)"),
    "uvicorn": ("0.42", "copies a body that comes in pieces once for each piece"),
}
"""The lowest version without a published flaw that matters here, and what earlier ones do."""

IMPORTED_AS = {"PIL": "pillow", "yaml": "pyyaml", "zmq": "pyzmq"}
EXTRA = {"kernels", "testing"}
BROUGHT = {"triton"}
"""Imported where torch brings it."""


def imported():
    """Return the packages of others that the source imports, as registries name them."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                found.add(node.module.partition(".")[0])
    others = found - sys.stdlib_module_names - {"safelight"}
    return {tool.canonical(IMPORTED_AS.get(name, name)) for name in others}


def test_what_is_imported_is_declared():
    declared = {tool.canonical(requirement.name) for requirement in DIRECT}
    extras = {
        tool.canonical(Requirement(line).name) for name in EXTRA for line in PROJECT["optional-dependencies"][name]
    }
    assert {"h11", "starlette", "torch", "pillow"} <= imported()
    assert imported() - BROUGHT <= declared | extras


@pytest.mark.parametrize("name", LEAST_SAFE)
def test_no_range_admits_a_version_with_a_known_flaw(name):
    least, flaw = LEAST_SAFE[name]
    (requirement,) = [each for each in DIRECT if tool.canonical(each.name) == name]
    (floor,) = [Version(specifier.version) for specifier in requirement.specifier if specifier.operator == ">="]
    assert floor >= Version(least), flaw


HEADERS = [b'form-data; name="' + b";" * 60_000, b"form-data" + b";" * 60_000, b"form-data; " + b"a;" * 30_000]


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: repr(header[:20]))
def test_a_parts_header_of_60_kb_is_parsed_at_once(header):
    """The first takes two seconds in python-multipart 0.0.27."""
    from python_multipart.multipart import parse_options_header

    began = time.process_time()
    parse_options_header(header)
    assert time.process_time() - began < 0.5


def test_direct_dependencies_are_few_and_have_two_ends():
    assert len(DIRECT) <= MOST_DEPENDENCIES
    for requirement in DIRECT:
        ends = {specifier.operator for specifier in requirement.specifier}
        assert ends == {">=", "<"}, requirement


@pytest.mark.parametrize("line", LINES)
def test_a_locked_version_binds_every_machine(line):
    """An exact public version of the registry that pip asks anyway: no local build, address, path, or marker."""
    name, _, version = line.partition("==")
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name), "as registries write it"
    assert Version(version).public == version and Version(version).local is None
    assert not re.match(r"(nvidia|cuda)", name)


def test_the_lock_is_sorted_and_names_each_package_once():
    names = [line.partition("==")[0] for line in LINES]
    assert names == sorted(set(names))


@pytest.mark.parametrize("requirement", [*DIRECT, *OF_TESTS], ids=lambda requirement: requirement.name)
def test_every_direct_dependency_is_locked_within_its_range(requirement):
    locked = dict(line.split("==") for line in LINES)
    assert requirement.specifier.contains(locked[tool.canonical(requirement.name)])


def test_the_lock_is_complete():
    """Whatever a locked package here asks for, on this machine, is locked as well."""
    from importlib.metadata import PackageNotFoundError, requires

    locked = dict(line.split("==") for line in LINES)
    environment: Any = {**default_environment(), "extra": ""}
    for name in locked:
        try:
            needed = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:  # of another platform, or another end of the ranges
            continue
        for requirement in needed:
            if requirement.marker is None or requirement.marker.evaluate(environment):
                its_name = tool.canonical(requirement.name)
                assert its_name in locked or tool.OF_A_HOST.match(its_name), f"{name} needs {requirement}"


def test_torch_has_a_build_for_processors_alone():
    assert "torch==2.13.0" in LINES


def test_locking_keeps_what_binds_everywhere():
    def item(name, version):
        return {"metadata": {"name": name, "version": version}, "download_info": {"url": "file:///somewhere"}}

    report = {
        "install": [
            item("torch", "2.13.0+cpu"),
            item("PyYAML", "6.0.4"),
            item("ruamel.yaml", "1.0"),
            item("Safelight", "0.1.0"),
            item("nvidia-cublas", "13.1"),
            item("nvidia_nccl_cu13", "2.28"),
            item("cuda-bindings", "13.0"),
            item("cudaless", "1.0"),
        ]
    }
    expected = ["cudaless==1.0", "pyyaml==6.0.4", "ruamel-yaml==1.0", "torch==2.13.0"]
    assert tool.locked(report, "safelight") == expected


def test_floors_are_the_lowest_of_each_range():
    floors = list(tool.floors(PROJECT["dependencies"], ["torch==2.13.0"]))
    assert len(floors) == len(DIRECT)
    for floor, requirement in zip(floors, DIRECT, strict=True):
        name, _, version = floor.partition("==")
        assert name == tool.canonical(requirement.name) and requirement.specifier.contains(version)
        lowest = next(specifier.version for specifier in requirement.specifier if specifier.operator == ">=")
        assert version == ("2.13.0" if name == "torch" else lowest)
    assert list(tool.floors(["a[b]>=1.2,<2; python_version > '3'", "c==3.1"])) == ["a==1.2", "c==3.1"]
    with pytest.raises(ValueError, match="'d<2' has no lower bound"):
        list(tool.floors(["d<2"]))


def test_the_two_commands_install_what_is_locked():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^\$\(READY\):(.*?)\n\n", makefile, re.MULTILINE | re.DOTALL)
    assert recipe.splitlines()[0].split() == ["pyproject.toml", "constraints.txt"]
    assert "$(LOCKED) $(BIN)/python $(PIP_INSTALL) -c constraints.txt -e" in recipe
    for target in ("demo", "lint", "types"):
        assert re.search(rf"^{target}: \$\(READY\)", makefile, re.MULTILINE)
    assert re.search(r"^test: lint types", makefile, re.MULTILINE)
