"""What the documents say is so: every block of every document is run, or compared with what really is."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

from safelight import errors
from safelight.cli.config_file import read_config
from safelight.cli.main import COMMANDS, cli
from safelight.core.server_args import ServerArgs
from safelight.serving.http import errors as serving_errors
from safelight.serving.http_args import HTTPArgs
from safelight.serving.principals import read_keys
from tests.attribution import STRICT
from tests.documents import (
    DOCUMENTS,
    ROOT,
    Block,
    Command,
    Console,
    assert_shown,
    blocks,
    commands,
    console,
    fill_hub,
    has_make,
    masked,
    parse_alone,
)
from tests.recipes import flux, own_pipelines
from training.shapes import all_scenes, prompt_for

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for path in DOCUMENTS for block in blocks(path)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    fill_hub(folder)
    return folder


# How each command of a console is covered


def dry(here: Console, command: Command) -> str:
    """`make -n` reads every rule of the target; the tests are what `make test` runs."""
    if not has_make():
        pytest.skip("there is no make")
    (target,) = command.words[1:]
    help = here.run("make", "-C", str(ROOT), "--no-print-directory", "help")
    assert re.search(rf"^{target}: ", help, re.MULTILINE), f"make {target} is not in the Makefile's help"
    assert here.run("make", "-C", str(ROOT), "-n", target, "PYTHON=python3").strip()
    return ""


def as_it_stands(here: Console, command: Command) -> str:
    """Run in a folder of its own; a Hub id finds a tiny checkpoint in the Hub's cache. Its file is there."""
    said = here.safelight(*command.words[1:])
    if "-o" in command.words:
        made = here.folder / command.words[command.words.index("-o") + 1]
        assert made.stat().st_size > 100
        if made.suffix == ".png":
            with Image.open(made) as picture:
                picture.load()
    return said


def served(here: Console, command: Command) -> str:
    """Start it on a free port; it runs while the block's other commands do, and ends well."""
    return here.serve(*command.words[2:])


def synopsis(here: Console, command: Command) -> str:
    """The help has every option that is named in brackets."""
    help = here.safelight(command.words[1], "--help")
    names = re.findall(r"--[a-z-]+", command.text)
    assert names
    for name in names:
        assert re.search(rf"^\s+{name}\b", help, re.MULTILINE), name
    return ""


BROKEN = """
import sys, torch
from safelight.checking import check
from safelight.cli.config_file import read_config
from safelight.cli.main import main
whole = check.load_pipeline

def broken(args):
    pipeline = whole(args)
    if args.backend == "native":
        with torch.no_grad():
            pipeline.get_module("transformer").transformer_blocks[1].attn.norm_k.weight += 0.5
    return pipeline

check.load_pipeline = broken
main(sys.argv[1:])
"""


def diverging(here: Console, command: Command) -> str:
    """Compare a tiny checkpoint whose weights differ in one place in our model: the document shows what is printed."""
    flux.build(here.folder / "checkpoint", "default")
    words = [str(here.folder / "checkpoint") if word == "CHECKPOINT" else word for word in command.words[1:]]
    ended = subprocess.run(
        [sys.executable, "-c", BROKEN, *words], capture_output=True, text=True, env=here.environment, timeout=300
    )
    assert ended.returncode == 1, ended.stderr
    return ended.stdout


def collected(here: Console, command: Command) -> str:
    """The tests that it runs are found; they are a part of `make test`."""
    words = ["flux" if word == "NAME" else word for word in command.words[1:]]
    return here.run(sys.executable, *words, "--collect-only", "-q", "-p", "no:cacheprovider", folder=ROOT)


def explained(here: Console, command: Command) -> str:
    """It takes minutes, of a machine with a GPU: its help says what it does; `tests/test_gpu_day.py` runs its parts."""
    assert "--help" in here.run(sys.executable, *command.words[1:], "--help", folder=ROOT)
    return ""


def installed(here: Console, command: Command) -> str:
    """Install into a folder of its own, without a network: the package's dependencies are there."""
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    words = [str(ROOT / word) if (ROOT / word).is_dir() else word for word in command.words[1:]]
    return here.python("-m", "pip", *words, *flags, "--target", str(here.packages))


def own_tests(here: Console, command: Command) -> str:
    """A package's tests are found; `tests/examples/test_own_suites.py` runs them."""
    flags = ("-p", "safelight.testing.plugin", "--collect-only", "-q", "-p", "no:cacheprovider")
    folder = str(ROOT / command.words[-1])
    return here.python(*command.words[1:-1], "-c", "/dev/null", "--rootdir", folder, *flags, folder)


def module(here: Console, command: Command) -> str:
    """Run it."""
    return here.python(*command.words[1:])


def on_one_machine(here: Console, command: Command) -> str:
    """Its options are torchrun's and ours. `tests/parallel/test_generator.py` runs two ranks of one machine."""
    ours = command.words.index("safelight")
    help = here.python("-m", "torch.distributed.run", "--help")
    for name in (word for word in command.words[:ours] if word.startswith("--")):
        assert f"{name} " in help.replace(",", " ").replace("_", "-"), name
    return synopsis(here, Command(command.words[ours:]))


WAYS: Mapping[str, tuple[Callable[[Console, Command], str], bool]] = {
    r"make [\w-]+": (dry, False),
    r"(\.venv/bin/)?safelight serve \[.*": (synopsis, False),
    r"safelight serve": (served, False),
    r"safelight check-model CHECKPOINT .*": (diverging, False),
    r"(\.venv/bin/)?safelight (generate|info|models|schema|plan|env) ?.*": (as_it_stands, False),
    r"\.venv/bin/python -m pytest .*": (collected, True),
    r"pip install examples/\w+": (installed, True),
    r"python -m pytest examples/\w+/tests": (own_tests, True),
    r"python -m toy_models\.\w+ .*": (module, True),
    r"python -m benchmarks\.\w+": (explained, False),
    r"torchrun .* --no-python safelight serve MODEL .*": (on_one_machine, False),
}
"""How each command is covered, and whether that takes long. One that is not here fails."""


def way_of(command: Command) -> tuple[Callable[[Console, Command], str], bool]:
    for pattern, way in WAYS.items():
        if re.fullmatch(pattern, command.text):
            return way
    raise AssertionError(f"no test covers {command.text!r}: say in WAYS how one does")


# How each language is covered


def run_console(block: Block, folder: Path, hub: Path) -> None:
    """Run every command in its way, and compare what it prints with what the document shows."""
    with console(folder, hub) as here:
        for command in commands(block.text):
            assert_shown(command.shown, way_of(command)[0](here, command).splitlines())


def run_python(block: Block, folder: Path, hub: Path) -> None:
    """Run it, warnings being errors, in a folder of its own."""
    here = Console(folder, hub)
    here.python(*STRICT, "-c", block.text)
    for name in re.findall(r'"([\w-]+\.png)"', block.text):
        shown = here.safelight("info", name)
        assert "prompt" in shown, "a picture that a document saves says how it was made"


def compare_toml(block: Block, folder: Path, hub: Path) -> None:
    """It stands so in one of the repository's files."""
    shown = tomllib.loads(block.text)
    files = [tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("examples/**/*.toml"))]
    assert any(holds(file, shown) for file in files)


def holds(whole: Any, part: Any) -> bool:
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(name in whole and holds(whole[name], value) for name, value in part.items())
    return bool(whole == part)


def read_settings(block: Block, folder: Path, hub: Path) -> None:
    """`--config` takes it."""
    (folder / "config.yaml").write_text(block.text)
    if block.text.lstrip().startswith("keys:"):
        assert read_keys(str(folder / "config.yaml"), HTTPArgs().max_cost)
        return
    given = read_config(folder / "config.yaml")
    names = [each.name for each in dataclasses.fields(HTTPArgs)]
    HTTPArgs(**{name: value for name, value in given.items() if name in names})
    ServerArgs(**{name: value for name, value in given.items() if name not in names})


def training(block: Block, folder: Path, hub: Path) -> None:
    """Prompts are all that there are. Commands take hours: each parses its arguments, and stops there."""
    lines = [line for line in block.text.splitlines() if line.strip()]
    if len(lines) == 1:
        assert {prompt_for(scene) for scene in all_scenes()} <= expanded(lines[0])
        return
    variables = dict(line.split("=", 1) for line in lines if re.fullmatch(r"[A-Z]+=\S+", line))
    runs = []
    for line in lines[len(variables) :]:
        words = shlex.split(re.sub(r"\$([A-Z]+)", lambda found: variables[found[1]], line))
        assert words[:2] == ["python", "-m"] and words[2].startswith("training."), line
        runs.append(words[2:])
    parse_alone(runs, Console(folder, hub).python)


def expanded(template: str) -> set[str]:
    """Return the prompts of a template with `{one|other}` and `{name}`, the values of which the README lists."""
    lists = dict(re.findall(r"(colour|shape|position)s? \(([\w, ]+)\)", " ".join(README.split())))
    found = [""]
    for plain, choice in re.findall(r"([^{]+)|\{([^}]+)\}", template):
        choices = [plain] if plain else choice.split("|") if "|" in choice else lists[choice].split(", ")
        found = [before + each for before in found for each in choices]
    return set(found)


LANGUAGES: Mapping[str, Callable[[Block, Path, Path], None]] = {
    "console": run_console,
    "python": run_python,
    "toml": compare_toml,
    "yaml": read_settings,
    "indented": training,
}
"""How each language is covered. Another one fails, and so does a block without one."""


def cases():
    for block in BLOCKS:
        long = block.language == "console" and any(way_of(command)[1] for command in commands(block.text))
        yield pytest.param(block, id=str(block), marks=[pytest.mark.slow] if long else [])


@pytest.mark.parametrize("block", list(cases()))
def test_every_block_is_so(block, tmp_path, hub):
    assert block.language in LANGUAGES, f"no test covers {block}: say in LANGUAGES how one does"
    LANGUAGES[block.language](block, tmp_path, hub)


def test_blocks_are_found_however_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.documents.ROOT", tmp_path)
    (tmp_path / "x.md").write_text(
        "# T\n\n```console\n$ a \\\n  b  # c\nd 1.5 s\n```\n\n~~~~json\n```\n~~~~\n\n"
        "text\n    no block\n\n    one\n\n    two\n\n"
        "- item\n    continued\n\n```\nx\n```\n"
    )
    found = [(block.line, block.language, block.text) for block in blocks(tmp_path / "x.md")]
    assert found == [
        (3, "console", "$ a \\\n  b  # c\nd 1.5 s\n"),
        (9, "json", "```\n"),
        (16, "indented", "one\n\ntwo\n"),
        (23, "", "x\n"),
    ]
    (command,) = commands(found[0][2])
    assert (command.words, command.shown) == (["a", "b"], ["d 1.5 s"])


def test_what_is_shown_is_compared():
    actual = ["loading", "ready after 5.2 s", "more", "last"]
    assert_shown(["ready after 61 s", "...", "last"], actual)
    for shown in (["ready after 61 ms"], ["last", "loading"], ["other"]):
        with pytest.raises(AssertionError):
            assert_shown(shown, actual)
    with pytest.raises(AssertionError, match="no test covers"):
        way_of(Command(["rm", "-rf", "/"]))
    assert masked("1x256x3x16   9.5e-07") == "NxNxNxN N"


# Sentences


def test_the_readme_lists_every_pipeline():
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == set(own_pipelines())


@pytest.mark.parametrize("document", [path.relative_to(ROOT) for path in DOCUMENTS], ids=str)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / document).read_text(encoding="utf-8")):
        assert (ROOT / document.parent / target).exists(), target


def options_of_all_commands() -> set[str]:
    found = {"--help", "--version", "--verbose"}
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        with pytest.raises(click.exceptions.Exit), click.Context(command, info_name=name) as own:
            command.parse_args(own, ["--help"])
        for parameter in command.params:
            found |= {*parameter.opts, *parameter.secondary_opts}
    return found


NOT_OURS = {"--quick", "--rounds", "--family", "--parity-report", "--slow", "--varied", "--host", "--out"}
"""Options of scripts and tests that documents name in a sentence."""


def test_options_that_sentences_name_are_there(capsys):
    known = options_of_all_commands() | NOT_OURS
    for path in DOCUMENTS:
        if path.name == "benchmarks.md":  # of the benchmarks' own options
            continue
        text = path.read_text(encoding="utf-8")
        for span in re.findall(r"`([^`\n]+)`", text):
            if re.match(r"(python|make|torchrun|\.venv)", span):
                continue
            for name in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span):
                assert name in known, f"{path.name}: {span}"


def test_modules_and_targets_that_sentences_name_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"`python -m ((?:benchmarks|training|tests)[\w.]+)", text):
            assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), f"{path.name}: {name}"
        for target in re.findall(r"`make ([a-z-]+)", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{path.name}: make {target}"
        for name in re.findall(r"`((?:src|tests|docs|examples|training|benchmarks)/[\w./-]+)`", text):
            assert (ROOT / name).exists() or "NAME" in name, f"{path.name}: {name}"


def test_files_and_names_that_sentences_name_are_there():
    """Python's files by their place in the package, and classes by their names."""
    folders = ("src", "tests", "examples", "benchmarks", "training")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
            assert any(each.match(name) for each in files) or "NAME" in name, f"{path.name}: {name}"
        for name in re.findall(r"`([A-Z][a-z]+(?:[A-Z]\w*)+)`", text):
            assert re.search(rf"\b{name}\b", source), f"{path.name}: {name}"


def is_error(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, errors.SafelightError)


def test_the_servers_document_has_every_status_and_exit_code():
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE)
    stated = {int(number) for row in rows for number in row.split(",")}
    ours = [cls for cls in (*vars(errors).values(), *vars(serving_errors).values()) if is_error(cls)]
    assert {cls.status for cls in ours} - {500} <= stated
    assert {cls.exit_code for cls in ours} - {1} <= stated
