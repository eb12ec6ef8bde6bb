"""`lora-merge join`: shards of a merge become the adapter."""

from pathlib import Path
from typing import Any

import click

from lora_merge.cli.shared.api import run_shown
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import json_option
from lora_merge.cli.shared.recipe_options import show_report
from lora_merge.merge.recipe.arguments import Join


@click.command(
    epilog="""\b
Examples:
  lora-merge merge a b c -M ties --rank 16 -o out --shard 1/2
  lora-merge merge a b c -M ties --rank 16 -o out --shard 2/2
  lora-merge join out
""",
)
@click.argument("out", type=click.Path(path_type=Path))
@options_of(Join)
@json_option
def command(out: Path, as_json: bool, **given: Any) -> None:
    """Make OUT of its shards in OUT.shards: the same bytes as one run makes.

    Every shard must be there, whole, and of the same recipe and adapters; otherwise nothing is
    written, and the shard is named. docs/scale.md has more.
    """
    import lora_merge
    from lora_merge.cli.shared.output import Output

    output = Output(as_json)
    show_report(run_shown(output, lora_merge.join, out, **given).report, output)
