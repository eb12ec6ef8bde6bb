"""What all commands share: options in groups, -v and -q."""

import logging
import warnings

import click
import pytest
from click.testing import CliRunner

from lora_merge.cli.app import _COMMANDS, cli
from lora_merge.cli.shared.command import _GROUP_OF, OWN

ADAPTERS = "examples/adapters/double", "examples/adapters/upper"


def _command(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def _groups(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for block in text.split("\n\n"):
        head, _, body = block.partition("\n")
        if head.endswith(":") and not head.startswith(" "):
            found[head[:-1]] = body
    return found


@pytest.mark.parametrize("name", _COMMANDS)
def test_help_shows_each_option_once_in_its_group(name: str) -> None:
    command = _command(name)
    text = CliRunner().invoke(cli, [name, "--help"]).output
    groups = _groups(text)
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            shown = max(option.opts, key=len)
            group = groups[_GROUP_OF.get(option.name or "", OWN)]
            lines = [
                line
                for line in group.splitlines()
                if shown in line.split("  ")[1].replace(",", "").split()
            ]
            assert len(lines) == 1, shown


def test_every_grouped_name_is_an_option_of_some_command() -> None:
    names = {option.name for name in _COMMANDS for option in _command(name).params}
    assert set(_GROUP_OF) - names == {"help"}


@pytest.mark.parametrize("place", ["before", "after"])
def test_verbose_says_what_is_done_on_stderr(place: str, tmp_path) -> None:
    words = ["merge", *ADAPTERS, "-o", str(tmp_path / "out")]
    words = ["-v", *words] if place == "before" else [*words, "-v"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0
    assert "lora_merge.adapters.adapter: opened examples/adapters/double" in result.stderr
    assert f"wrote {tmp_path / 'out'}" in result.stderr
    assert " ms  " not in result.stdout
    assert "down_proj done" not in result.stderr
    assert not logging.getLogger("lora_merge").handlers


def test_twice_verbose_says_it_module_by_module(tmp_path) -> None:
    result = CliRunner().invoke(cli, ["merge", *ADAPTERS, "-o", str(tmp_path / "out"), "-vv"])
    assert "model.layers.1.mlp.down_proj done, rank" in result.stderr


def test_quiet_leaves_the_result_alone(tmp_path) -> None:
    words = ["merge", *ADAPTERS, "-o", str(tmp_path / "out")]
    loud = CliRunner().invoke(cli, [*words, "--dry-run"])
    quiet = CliRunner().invoke(cli, [*words, "--dry-run", "-q"])
    assert "note:" in loud.stderr
    assert quiet.stderr == ""
    assert quiet.stdout == loud.stdout


def test_quiet_ends_with_its_command(tmp_path) -> None:
    before = list(warnings.filters)
    CliRunner().invoke(cli, ["-q", "merge", *ADAPTERS, "-o", str(tmp_path / "out"), "--dry-run"])
    assert warnings.filters == before
    loud = CliRunner().invoke(cli, ["merge", *ADAPTERS, "-o", str(tmp_path / "out"), "--dry-run"])
    assert "note:" in loud.stderr
