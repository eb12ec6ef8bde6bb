"""Options of commands are the fields of the dataclasses that the library takes."""

import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Literal

import click
import pytest
from click.testing import CliRunner

from lora_merge.cli.commands import cluster, merge, train
from lora_merge.cli.shared.fields import names_of, options_of
from lora_merge.merge.methods.lego_options import LegoOptions
from lora_merge.merge.recipe.recipe import Recipe, Semantics
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.options import option


@dataclass(frozen=True)
class Settings:
    many: int = option(3, "how many", low=1)
    share: float | None = option(None, "which share", above=0, below=1, unset="all")
    kind: Literal["a", "b"] = option("a", "of what kind")
    on: bool = option(True, "whether to")
    hidden: int = 0


def given(*arguments: str) -> dict[str, object]:
    found: dict[str, object] = {}

    @click.command()
    @options_of(Settings)
    def command(**options: object) -> None:
        found.update(options)

    result = CliRunner().invoke(command, arguments)
    if result.exit_code:
        raise click.UsageError(result.output)
    return found


def test_defaults_kinds_and_limits_are_the_fields() -> None:
    assert given() == {"many": 3, "share": None, "kind": "a", "on": True}
    assert given("--share", "0.5", "--no-on", "--kind", "b")["share"] == 0.5
    for wrong in (["--many", "0"], ["--share", "0"], ["--share", "1"], ["--kind", "c"]):
        with pytest.raises(click.UsageError):
            given(*wrong)


@pytest.mark.parametrize(
    ("command", "kind", "names"),
    [
        (cluster.command, LegoOptions, ("restarts",)),
        (train.command, TrainSettings, names_of(TrainSettings)),
        (merge.command, Semantics, names_of(Semantics)),
        (merge.command, Recipe, names_of(Recipe)),
    ],
)
def test_every_field_is_an_option_with_its_default(
    command: click.Command, kind: type, names: tuple[str, ...]
) -> None:
    shown = {parameter.name: parameter for parameter in command.params}
    assert set(names) <= set(shown)
    for spec in fields(kind):
        if spec.name in names and spec.default is not None:
            context = click.Context(command)
            # A recipe that says nothing means the published scale; a command decides one.
            default = "auto" if spec.name == "scale" else spec.default
            assert shown[spec.name].get_default(context) == default


def test_cluster_leaves_to_the_published_form_what_is_not_given() -> None:
    shown = {parameter.name: parameter for parameter in cluster.command.params}
    for spec in fields(LegoOptions):
        given = shown[spec.name].get_default(click.Context(cluster.command))
        assert given == (spec.default if spec.name == "restarts" else None) or given is False


def test_every_training_setting_is_declared() -> None:
    assert names_of(TrainSettings) == tuple(spec.name for spec in fields(TrainSettings))


def test_help_of_any_command_imports_no_torch() -> None:
    script = (
        "import sys, importlib\n"
        "from lora_merge.cli.app import _COMMANDS\n"
        "for name in _COMMANDS:\n"
        "    importlib.import_module(f'lora_merge.cli.commands.{name}')\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
