"""`lora-merge run`: a merge from its recipe."""

from pathlib import Path
from typing import Any

import click

from lora_merge.cli.shared.recipe_options import run_merge, run_options


@click.command
@click.argument("recipe", type=click.Path(path_type=Path))
@run_options
def command(recipe: Path, **arguments: Any) -> None:
    """Run a RECIPE: the lora_merge.yaml beside a merged adapter makes the same bytes again.

    Paths in it are relative to its own directory, or to the current one where that has none.
    """
    run_merge(recipe, **arguments)
