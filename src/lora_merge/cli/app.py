"""The `lora-merge` command: a table of subcommands, and what becomes of errors."""

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from shutil import get_terminal_size
from textwrap import fill
from typing import Any

import click

from lora_merge._version import __version__
from lora_merge.arguments import ArgumentError
from lora_merge.cli.shared import verbosity
from lora_merge.cli.shared.command import Command
from lora_merge.cli.shared.escape import for_terminal
from lora_merge.errors import LoraMergeError, remedy_of
from lora_merge.files.inputs import noting_inputs

# Name → module with a click command `command`. Modules are imported when their command is needed,
# and none of them imports torch at its top.
_COMMANDS = {
    "cluster": "lora_merge.cli.commands.cluster",
    "merge": "lora_merge.cli.commands.merge",
    "run": "lora_merge.cli.commands.run",
    "join": "lora_merge.cli.commands.join",
    "arrive": "lora_merge.cli.commands.arrive",
    "pack": "lora_merge.cli.commands.pack",
    "methods": "lora_merge.cli.commands.methods",
    "fuse": "lora_merge.cli.commands.fuse",
    "resize": "lora_merge.cli.commands.resize",
    "extract": "lora_merge.cli.commands.extract",
    "convert": "lora_merge.cli.commands.convert",
    "info": "lora_merge.cli.commands.info",
    "spectra": "lora_merge.cli.commands.spectra",
    "compare": "lora_merge.cli.commands.compare",
    "report": "lora_merge.cli.commands.report",
    "evaluate": "lora_merge.cli.commands.evaluate",
    "search": "lora_merge.cli.commands.search",
    "gate": "lora_merge.cli.commands.gate",
    "train": "lora_merge.cli.commands.train",
    "usage": "lora_merge.cli.commands.usage",
    "consolidate": "lora_merge.cli.commands.consolidate",
    "describe": "lora_merge.cli.commands.describe",
    "novelty": "lora_merge.cli.commands.novelty",
    "export": "lora_merge.cli.commands.export",
    "tune": "lora_merge.cli.commands.tune",
    "doctor": "lora_merge.cli.commands.doctor",
    "completion": "lora_merge.cli.commands.completion",
}
# click's name of the variable by which a shell asks; `completion` writes the shell's side of it.
COMPLETE = "_LORA_MERGE_COMPLETE"


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return Command.of(import_module(_COMMANDS[cmd_name]).command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = get_close_matches(args[0], _COMMANDS, n=1)
        if args[0] not in _COMMANDS and near and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}; did you mean {near[0]!r}?", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a reader that goes away (`| head`) ends it without a complaint.

        Arguments that exclude one another are the command line's fault.
        """
        try:
            super().invoke(ctx)
            sys.stdout.flush()
        except ArgumentError as error:
            raise click.UsageError(str(error)) from error
        except BrokenPipeError:  # here, because click would exit with 1
            _leave_stdout()


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="lora-merge")
def cli() -> None:
    """Cluster, merge and look into LoRA adapters, rank by rank.

    An ADAPTER is a directory, a .safetensors file, a glob, user/repo[@revision][:subfolder]
    an hf:// URI, a library (of `pack`), LIBRARY:name or LIBRARY[tag=value].
    """


cli.params += verbosity.options()


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code, as `__main__.main` explains them."""
    if COMPLETE in os.environ:  # a shell asks what could follow
        import_module("lora_merge.cli.shared.completion")
    try:
        with noting_inputs():
            cli.main(arguments, prog_name="lora-merge", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted")
        return 130
    except LoraMergeError as error:
        if os.environ.get("LORA_MERGE_DEBUG"):
            raise
        _complain(f"error: {error}")
        return 1
    except OSError as error:  # what nobody foresaw of a disk or a network
        if os.environ.get("LORA_MERGE_DEBUG"):
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _leave_stdout()
        place = f"{error.filename}: " if error.filename else ""
        remedy = remedy_of(error, "check the path and its rights")
        _complain(f"error: {place}{error.strerror or error}\n  try: {remedy}")
        return 1
    return 0


def _leave_stdout() -> None:
    """Write nothing more to it: Python would complain when it closes it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str) -> None:
    if sys.stderr.isatty():  # which would break it within words
        width = get_terminal_size().columns
        text = "\n".join(
            fill(line, width, break_long_words=False, break_on_hyphens=False)
            for line in text.splitlines()
        )
    click.echo(for_terminal(text), err=True)
