"""`lora-merge soup`: the average of checkpoints that scores best on your rows."""

from pathlib import Path
from typing import Any

import click

from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import adapters_argument, force_option, json_option
from lora_merge.evaluation.options import MakeSoup


@click.command(
    epilog="""\b
Examples:
  lora-merge soup 'run/checkpoint-*' --base ./llama --data rows.jsonl -o soup
  lora-merge soup one two three --base ./llama --data rows.jsonl -o soup
""",
)
@adapters_argument
@click.option("--rank", help="Rank of the result, or a rank rule.  [default: the largest]")
@options_of(MakeSoup)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Directory to make."
)
@force_option("an adapter directory")
@json_option
def command(
    adapters: tuple[str, ...],
    rank: str | None,
    out: Path,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Average ADAPTERs of one task, each only if the average is no worse with it (a greedy soup).

    The best alone comes first. Rows that chose nothing compare it, the mean of all, and the soup.
    """
    import lora_merge
    from lora_merge.cli.shared.api import shown_progress
    from lora_merge.cli.shared.open import check_out
    from lora_merge.cli.shared.output import Output, percent
    from lora_merge.cli.shared.table import table
    from lora_merge.printing import short_names

    output = Output(as_json)
    check_out(out, *adapters, given["base"], given["data"], force=force)
    number = int(rank) if rank and rank.isdigit() else rank
    with shown_progress(output) as progress:
        found = lora_merge.soup(list(adapters), rank=number, **given, progress=progress)
    lora_merge.run_recipe(found.recipe, out, force=force)
    share = found.higher and found.metric in ("accuracy", "exact-match")

    def said(score: float) -> str:
        return percent(score) if share else f"{score:.4g}"

    grid = table("adapter", f"{found.metric} alone", "with it", "")
    names = short_names([one.adapter for one in found.ingredients])
    for name, one in zip(names, found.ingredients, strict=True):
        grid.add_row(name, said(one.alone), said(one.stirred), "in" if one.kept else "left out")
    held = table("held out", found.metric)
    for name, score in found.held_out.items():
        held.add_row(name, said(score))
    output.data(found.to_dict(), grid, held, f"wrote {out}")
