"""Options that several commands share."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

adapters_argument = click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
width_option = click.option(
    "--width", type=click.IntRange(min=60), help="Columns.  [default: the terminal's]"
)
pickle_option = click.option(
    "--allow-pickle", is_flag=True, help="Load .bin files (with weights_only=True)."
)
bases_option = click.option(
    "--accept-base-models", is_flag=True, help="Accept adapters that name different base models."
)


OUT = {"out": "directory to make"}  # commands that have --dry-run: nothing stays in memory
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Show what would be made, write nothing."
)


def take_out(given: dict[str, Any], dry_run: bool) -> None:
    """Refuse a run without -o; a dry run needs neither it nor --force."""
    if dry_run:
        del given["out"], given["force"]
    elif given["out"] is None:
        raise click.UsageError("missing option '-o' (or --dry-run)")


def force_option(what: str) -> Callable[[F], F]:
    """`--force`, which replaces an output that is there and does nothing else."""
    return click.option("--force", is_flag=True, help=f"Replace {what} that is there.")


class Choice(click.Choice[str]):
    """One of some words; another is told the nearest."""

    def __init__(self, choices: Iterable[str]) -> None:
        super().__init__(choices, case_sensitive=False)

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """What the wrong word is told: the nearest, or all if none is near."""
        near = get_close_matches(str(value).lower(), self.choices, n=1)
        if near:
            return f"there is no {value!r}; did you mean {near[0]!r}?"
        return f"there is no {value!r}; choose from: {', '.join(self.choices)}"


class WeightType(click.ParamType):  # type: ignore[type-arg]
    """A number, or a YAML list of numbers or of {filter, value}."""

    name = "weight"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The weight as plain data."""
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
        import yaml

        try:
            data = yaml.safe_load(value)
        except yaml.YAMLError:
            data = None
        if not isinstance(data, list):
            self.fail(f"{value!r} is no number and no list", param, ctx)
        return data


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown in the order given."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
