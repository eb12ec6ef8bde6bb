"""`lora-merge sweep`: candidates for eyes to choose from."""

from pathlib import Path
from typing import Any

import click

from lora_merge.cli.shared.options import adapters_argument, force_option, json_option
from lora_merge.cli.shared.texts import words


@click.command(
    epilog="""\b
Examples:
  lora-merge sweep style.safetensors person.safetensors -o look
  lora-merge sweep a b --over scale,weights --count 16 -o look
  lora-merge sweep a b --over method --methods svd,ties --count 6 -o look
""",
)
@adapters_argument
@click.option("-M", "--method", default="svd", show_default=True, help="Method to start from.")
@click.option("--rank", help="Rank of the results, or a rank rule.")
@click.option(
    "--over", callback=words, default="scale", show_default=True, help="What varies; see search."
)
@click.option("--methods", callback=words, help="Methods to choose from, with --over method.")
@click.option("--count", type=click.IntRange(min=2), default=8, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the spread.")
@click.option("--jobs", type=click.IntRange(min=1), help="Worker threads.  [default: CPUs]")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Directory to make."
)
@force_option("a directory")
@json_option
def command(
    adapters: tuple[str, ...],
    method: str,
    rank: str | None,
    count: int,
    out: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write COUNT merges of ADAPTERs that differ in what --over says: no rows, no base model.

    The first is the merge as `merge` makes it. A scale alone goes from half of it to twice it.
    Each candidate is an adapter with its recipe; look at what they make, and keep one.
    """
    import lora_merge
    from lora_merge.cli.shared.output import Output
    from lora_merge.cli.shared.table import table
    from lora_merge.evaluation.sweep import said

    output = Output(as_json)
    number = int(rank) if rank and rank.isdigit() else rank
    recipe = {"merge_method": method, "adapters": list(adapters), "rank": number, "scale": "auto"}
    with output.progress("writing", count) as advance:
        found = lora_merge.sweep(recipe, out, count=count, on_candidate=advance, **settings)
    grid = table("candidate", "what differs")
    for candidate in found.candidates:
        grid.add_row(candidate.name, said(candidate.values))
    output.data(found.to_dict(), grid, f"wrote {out}: {count} candidates and sweep.json")
