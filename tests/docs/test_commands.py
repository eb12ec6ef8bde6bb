"""Every command in README and docs, run or not, is one that the program understands."""

import re
import shlex
from pathlib import Path

import click
import pytest

from lora_merge.cli.app import _COMMANDS, cli
from pages import ROOT, differences, run_step, steps_of, workplace

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(?:console|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(lora-merge [^`\n]+)`")
# A placeholder for options, and what else is no command line though it looks like one.
_SKIPPED = ("...", "…", "[", "{")


def lines_of(text: str) -> list[str]:
    """Command lines in blocks, and those written inside sentences."""
    found = []
    for block in _BLOCK.findall(text):
        joined = block.replace("\\\n", " ")
        for line in joined.splitlines():
            line = line.removeprefix("$ ").partition(" #")[0].strip()
            if line.startswith("lora-merge "):
                found.append(line)
    rest = _BLOCK.sub("", text)
    return found + [line.replace("\\|", "|") for line in _INLINE.findall(rest)]


def understood(line: str) -> None:
    """Parse it as click would; only what it names need not exist.

    Raises:
        click.UsageError: If the command or an option is none.
    """
    _, *words = shlex.split(line)
    words = [word for word in words if word not in ("|", "&&")]
    name, *rest = [word for word in words if word not in ("-v", "-q", "-vv")]
    command = cli.get_command(click.Context(cli), name)
    if command is None:
        raise click.UsageError(f"no command {name!r}")
    context = click.Context(command)
    command.make_parser(context).parse_args(rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_names_commands_and_options_that_are_there(page: Path) -> None:
    for line in lines_of(page.read_text(encoding="utf-8")):
        if any(mark in line for mark in _SKIPPED) or line.split()[1].startswith("-"):
            continue
        try:
            understood(line)
        except click.BadOptionUsage as error:
            assert line.endswith(error.option_name), line  # an option that is named in prose
        except click.UsageError as error:
            raise AssertionError(f"{line}: {error.format_message()}") from error


@pytest.mark.parametrize("name", _COMMANDS)
def test_the_examples_of_help_are_understood(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for line in map(str.strip, (command.epilog or "").replace("\\\n", " ").splitlines()):
        if line.startswith("lora-merge ") and ">" not in line:
            understood(re.split(r"\s{3,}", line)[0])  # without what is said of it


def test_what_is_no_command_or_option_is_seen() -> None:
    assert lines_of(
        "```sh\nlora-merge info a \\\n  --json  # what\n```\nor `lora-merge run x`"
    ) == [
        "lora-merge info a    --json",
        "lora-merge run x",
    ]
    understood("lora-merge merge a b -M ties")
    for wrong in ("lora-merge merge a b --metod ties", "lora-merge marge a"):
        with pytest.raises(click.UsageError):
            understood(wrong)


def test_the_readmes_first_command_prints_what_it_shows(tmp_path: Path) -> None:
    blocks = re.findall(
        r"^```console\n.*?^```$", PAGES[0].read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert blocks
    with workplace(tmp_path):
        for step in steps_of("\n".join(blocks)):
            assert not differences(step.shown, run_step(step))
