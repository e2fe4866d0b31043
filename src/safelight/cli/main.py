"""`safelight`: the commands, and how errors end. Start-up imports no torch."""

from __future__ import annotations

import gc
import importlib
import logging
import sys
from collections.abc import Mapping

import click

from safelight.errors import SafelightError, nearest
from safelight.runtime.logs import configure, tell
from safelight.runtime.processes import guard_children
from safelight.version import __version__

COMMANDS: Mapping[str, tuple[str, str]] = {
    "generate": ("safelight.cli.generate:generate", "Make pictures or videos from a prompt."),
    "serve": ("safelight.cli.serve:serve", "Serve a model over HTTP, behind OpenAI's API."),
    "models": ("safelight.cli.inspect:models", "List the pipelines that run here, and known models of each."),
    "schema": ("safelight.cli.inspect:schema", "Print what a model takes, as JSON Schema; loads no weights."),
    "plan": ("safelight.cli.plan:plan", "Print how a model fits into a device's memory; loads no weights."),
    "info": ("safelight.cli.inspect:info", "Print how a picture or video was made."),
    "check-model": ("safelight.cli.check:check_model", "Compare a model with Diffusers, tensor by tensor."),
    "env": ("safelight.cli.inspect:env", "Print versions, devices and processor features, for a report."),
}
INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = vars(importlib.import_module(module))[name]
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is meant; for an unknown name, suggest the nearest."""
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            ctx.fail(f"unknown command {args[0]!r}: {nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="safelight")
@click.option("-v", "--verbose", is_flag=True, help="Log what is done, and show tracebacks.")
def cli(verbose: bool) -> None:
    """Run diffusion models: `safelight generate "a large red circle at the left on a white background"`."""
    configure(logging.INFO if verbose else logging.ERROR, "%(name)s: %(message)s")
    logging.getLogger("safelight.memory").setLevel(logging.INFO)  # of a plan that was asked for


def main(args: list[str] | None = None) -> None:
    """Run a command line; an error is one line on standard error, and an exit code."""
    arguments = sys.argv[1:] if args is None else args
    if args is None:  # the process is ours
        guard_children()
    try:
        code = cli.main(arguments or ["--help"], prog_name="safelight", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        _end(error.format_message(), error.exit_code)
    except SafelightError as error:
        _end(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _end("interrupted", INTERRUPTED)
    except Exception as error:  # the process's boundary: whatever it was, the user gets one line
        if "-v" in arguments or "--verbose" in arguments:
            raise
        what = "a package is missing or broken" if isinstance(error, ImportError) else "internal error"
        _end(f"{what}: {type(error).__name__}: {error} (safelight -v shows where)", 1)
    finally:
        gc.freeze()  # nothing is looked for at the end of a process: with torch that takes half a second


def _end(message: str, code: int) -> None:
    tell(f"safelight: {' '.join(message.split())}")
    sys.exit(code)


if __name__ == "__main__":
    main()
