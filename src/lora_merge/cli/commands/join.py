"""`lora-merge join`: shards of a merge become the adapter."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from lora_merge.cli.shared.options import force_option, json_option
from lora_merge.cli.shared.recipe_options import Progress, show_report


@click.command(
    epilog="""\b
Examples:
  lora-merge merge a b c -M ties --rank 16 -o out --shard 1/2
  lora-merge merge a b c -M ties --rank 16 -o out --shard 2/2
  lora-merge join out
""",
    short_help="Put the shards of a merge together.",
)
@click.argument("out", type=click.Path(path_type=Path))
@force_option("an adapter directory")
@click.option("--strict", is_flag=True, help="Fail if the cut to a rank loses over half.")
@click.option("--keep", is_flag=True, help="Leave OUT.shards where it is.")
@click.option("--jobs", type=click.IntRange(min=1), help="Worker threads.  [default: CPUs]")
@json_option
def command(out: Path, as_json: bool, **arguments: Any) -> None:
    """Make OUT of its shards in OUT.shards: the same bytes as one run makes.

    Every shard must be there, whole, and of the same recipe and adapters; otherwise nothing is
    written, and the shard is named. docs/scale.md has more.
    """
    from lora_merge.cli.shared.output import Output
    from lora_merge.merge.shards.join import join

    output = Output(as_json)
    with ExitStack() as showing:
        shown = Progress(output, showing)
        report = join(out, **arguments, on_plan=shown.begin, on_module=lambda _: shown.advance())
    show_report(report, output, shown.notes)
