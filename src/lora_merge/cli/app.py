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
from lora_merge.cli.shared.command import Command, verbosity_options
from lora_merge.cli.shared.escape import for_terminal
from lora_merge.errors import ArgumentError, LoraMergeError, remedy_of
from lora_merge.files.inputs import noting_inputs

# Command → what it does. Each is a module of its name in `commands` with a click command `command`,
# imported when it is needed; none of them imports torch at its top.
_COMMANDS = {
    "cluster": "Cluster rank-wise units into one adapter (LoRA-LEGO).",
    "merge": "Merge adapters by any method.",
    "run": "Run a recipe (lora_merge.yaml).",
    "join": "Put the shards of a merge together.",
    "arrive": "Keep adapters that arrive one by one in K slots.",
    "pack": "Pack many adapters into a library.",
    "methods": "The merge methods, or one of them in full.",
    "fuse": "Write base model + adapter as one model.",
    "resize": "Lower an adapter's ranks, by energy, budget or another rule.",
    "extract": "A LoRA from a model and its fine-tuned version.",
    "convert": "An adapter of any form in the format of another tool.",
    "info": "What an adapter is: modules, ranks, norms, oddities.",
    "spectra": "Singular spectra: what rank is worth keeping, and where.",
    "compare": "All pairs: cosine, overlap, interference; who can be averaged.",
    "report": "One interactive page: spectra, heat maps, pairs, warnings.",
    "evaluate": "Score adapters, merges and mixtures on rows.",
    "search": "Find the recipe whose merge scores best on rows.",
    "soup": "Average the checkpoints that score best together.",
    "sweep": "Write candidates for eyes to choose from.",
    "gate": "Put adapters behind a gate: one mixture directory.",
    "train": "Train a mixture's gate, prune its ranks or train its experts.",
    "usage": "Show which expert speaks where, on your text.",
    "consolidate": "Merge a mixture's experts by how they are used.",
    "describe": "Learn what each expert's texts look like.",
    "novelty": "Say whether texts need a new expert.",
    "export": "Write a mixture for tools that know no gates.",
    "tune": "Measure which kernels are fastest on this machine.",
    "doctor": "Versions, devices, caches, optional parts: for bug reports.",
    "completion": "Completion for bash, zsh or fish.",
}
# click's name of the variable by which a shell asks; `completion` writes the shell's side of it.
COMPLETE = "_LORA_MERGE_COMPLETE"


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"lora_merge.cli.commands.{cmd_name}")
        return Command.of(module.command, _COMMANDS[cmd_name])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table, without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

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

    An ADAPTER is a directory, a .safetensors file, a glob,
    user/repo[@revision][:subfolder], an hf:// URI, a library (of `pack`), LIBRARY:name
    or LIBRARY[tag=value].
    """


cli.params += verbosity_options()


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code, as `__main__.main` explains them."""
    if COMPLETE in os.environ:  # a shell asks what could follow
        import_module("lora_merge.cli.shared.completion")
    try:
        with noting_inputs():
            cli.main(arguments, prog_name="lora-merge", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        _complain(_of_usage(error))
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


def _of_usage(error: click.ClickException) -> str:
    """What is wrong with a command line, and what to try."""
    text, remedy = error.format_message().rstrip("."), ""
    if isinstance(error, click.UsageError) and error.ctx:
        remedy = f"{error.ctx.command_path} --help"
    if isinstance(error, click.NoSuchOption) and error.possibilities:
        text, remedy = error.message.rstrip("."), f"did you mean {error.possibilities[0]!r}?"
    first, *rest = text.split(" ", 1)
    text = " ".join([first.lower() if first.isalpha() else first, *rest])
    return f"error: {text}" + (f"\n  try: {remedy}" if remedy else "")


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
