"""The blocks of the documents, and how a console's commands are run: with tiny checkpoints where a Hub id is named."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safelight.cli.main import COMMANDS
from tests.live_server import LiveServer, free_port
from tests.recipes import flux, wan

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "training/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)
SECONDS = 300
SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}
STAND_INS: dict[str, tuple[Callable[[Path, str], None], str, dict[str, int]]] = {
    "black-forest-labs/FLUX.1-schnell": (flux.build, "schnell", SMALL),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (wan.build, "default", SMALL | {"num_frames": 5}),
}
"""What lies in the Hub's cache under the ids that documents name: a builder, its variant, and sizes of its own."""


@dataclass(frozen=True)
class Block:
    """A fenced or indented block.

    Attributes:
        document: its path from the root.
        line: where it begins.
        language: of the fence; `indented` for one without.
        text: what it holds.

    """

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        """Return where it is."""
        return f"{self.document}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    """Yield the blocks of a document, as CommonMark has them outside lists."""
    lines = path.read_text(encoding="utf-8").split("\n")
    name, number = str(path.relative_to(ROOT)), 0
    while number < len(lines):
        fence = re.match(r" {0,3}(`{3,}|~{3,}) *([\w+-]*)", lines[number])
        begin, number = number, number + 1
        if fence is not None:
            closing = re.compile(rf" {{0,3}}{re.escape(fence[1][0])}{{{len(fence[1])},}}\s*$")
            while not closing.match(lines[number]):
                number += 1
            yield Block(name, begin + 1, fence[2], "\n".join(lines[begin + 1 : number]) + "\n")
            number += 1
        elif lines[begin].startswith("    ") and lines[begin].strip() and not lines[begin - 1].strip():
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                number += 1
            text = "\n".join(line.removeprefix("    ") for line in lines[begin:number])
            yield Block(name, begin + 1, "indented", text.strip("\n") + "\n")


@dataclass
class Command:
    """One command of a console, and the lines that the document shows as its answer."""

    words: list[str]
    shown: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The command as one line."""
        return " ".join(self.words)


def commands(text: str) -> list[Command]:
    """Return the commands of a console."""
    found: list[Command] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            found.append(Command(shlex.split(line[2:], comments=True)))
        else:
            assert found, f"a console begins with a command, not with {line!r}"
            found[-1].shown.append(line)
    return found


def masked(line: str) -> str:
    """Return a line with its numbers and spaces made alike."""
    return " ".join(re.sub(r"\d[\d.,]*(?:e[+-]?\d+)?", "N", line).split())


def assert_shown(shown: Sequence[str], actual: Sequence[str]) -> None:
    """Hold real output to what a document shows of it, in order, numbers apart; `...` is any number of lines."""
    rest = iter(masked(line) for line in actual)
    for line in shown:
        if line.strip() != "...":
            assert masked(line) in rest, f"{line!r} was not printed, or not there: {list(actual)}"


class Console:
    """A folder in which the commands of a block are run, one after the other, as a reader would.

    Args:
        folder: empty, and of this block alone.
        hub: the cache of the Hub.

    """

    def __init__(self, folder: Path, hub: Path) -> None:
        self.folder, self.packages = folder, folder / "packages"
        self.environment = {
            **os.environ,
            "HF_HOME": str(hub),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{self.packages}:{ROOT}",
            "SAFELIGHT_STATE_DIR": str(folder / "state"),
        }
        self._server: LiveServer | None = None

    def run(self, *command: str, folder: Path | None = None) -> str:
        """Run a command to its end, which must be a good one; return all that it wrote."""
        ended = subprocess.run(
            command,
            cwd=folder or self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout}"
        return ended.stdout

    def python(self, *arguments: str) -> str:
        """Run Python."""
        return self.run(sys.executable, *arguments)

    def safelight(self, *arguments: str) -> str:
        """Run a command line of ours, with the running server in the place of the one that the document has."""
        here = [word.replace("http://127.0.0.1:8000", self._server.url if self._server else word) for word in arguments]
        assert here[0] in COMMANDS
        return self.python("-m", "safelight.cli.main", *here)

    def serve(self, *arguments: str) -> str:
        """Start a server, which runs until the block ends; return what it says until it is ready."""
        port, log = free_port(), self.folder / "server.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "safelight.cli.main", "serve", *arguments, "--port", str(port)],
                cwd=self.folder,
                env=self.environment,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                text=True,
            )
        self._server = LiveServer(process, port, log)
        self._server.wait_ready()
        end = time.monotonic() + 10
        while "is ready" not in log.read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        return log.read_text().replace(f":{port}", ":8000")

    def close(self) -> None:
        """Stop the server, if there is one: as a reader does, and well."""
        if self._server is not None:
            assert self._server.stop(signal.SIGINT) == 0, self._server.log.read_text()


@contextlib.contextmanager
def console(folder: Path, hub: Path) -> Iterator[Console]:
    """Give a console, and end what it leaves running."""
    made = Console(folder, hub)
    try:
        yield made
    finally:
        made.close()


def fill_hub(folder: Path) -> None:
    """Put the stand-ins into a cache of the Hub, as huggingface_hub lays it out."""
    for name, (build, variant, defaults) in STAND_INS.items():
        repo = folder / "hub" / f"models--{name.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("0" * 40)
        snapshot = repo / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        build(snapshot, variant)
        (snapshot / "generation_config.json").write_text(json.dumps(defaults))


PARSE_ALONE = """
import argparse, json, runpy, sys

class Parsed(Exception):
    pass

parse = argparse.ArgumentParser.parse_args

def parse_alone(self, *arguments, **options):
    parse(self, *arguments, **options)
    raise Parsed

argparse.ArgumentParser.parse_args = parse_alone
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__")
    except Parsed:
        print("parsed", module)
"""


def parse_alone(runs: Sequence[Sequence[str]], run: Callable[..., str]) -> None:
    """Let modules parse their arguments, strictly and by themselves, and do nothing else: what they do takes hours."""
    said = run("-c", PARSE_ALONE, json.dumps(list(runs)))
    assert re.findall(r"^parsed (.*)$", said, re.MULTILINE) == [module for module, *_ in runs]


def has_make() -> bool:
    """Say whether there is a make."""
    return shutil.which("make") is not None
