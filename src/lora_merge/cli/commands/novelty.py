"""`lora-merge novelty`: do texts need an expert that a mixture does not have?"""

from pathlib import Path
from typing import Any

import click

from lora_merge.api.arguments.texts import Novelty
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import json_option
from lora_merge.cli.shared.texts import Rows, mixture_argument

_SHOWN = 10  # rows of the table


@click.command(
    epilog="""\b
Examples:
  lora-merge novelty described --base ./llama --data new.jsonl
""",
)
@mixture_argument
@options_of(Novelty)
@json_option
def command(mixture: Path, as_json: bool, **given: Any) -> None:
    """Compare each text in DATA with what each expert of MIXTURE knows.

    Scores are deviations above the reconstruction error of the expert's own texts. A row is new if
    at some module every expert's score is above the threshold; a new expert is needed if most rows
    are. Of texts that are known, a few lie above it by chance.
    """
    import lora_merge
    from lora_merge.cli.shared.output import Output
    from lora_merge.cli.shared.table import table

    output = Output(as_json)
    rows = Rows(output)
    found = lora_merge.novelty(mixture, **given, on_data=rows)
    nearest = [found.nearest(number) for number in range(len(found.texts))]
    grid = table("nearest expert", "rows", "of them new")
    for name in found.experts:
        own = [number for number, other in enumerate(nearest) if other == name]
        grid.add_row(name, str(len(own)), str(len(set(own) & set(found.new_rows))))
    single = table("row", "nearest expert", "score")
    for number in found.new_rows[:_SHOWN]:
        single.add_row(
            str(number + 1), nearest[number], f"{max(map(min, found.texts[number])):.1f}"
        )
    count = len(found.new_rows)
    shown = f", the first {_SHOWN} shown" if count > _SHOWN else ""
    verdict = (
        f"a new expert is needed: {count} of {len(nearest)} rows are new{shown}, most of all at "
        f"{found.strangest}"
        if found.is_new
        else f"these texts are known: {count} of {len(nearest)} rows are new{shown}"
    )
    output.data(
        {**found.to_dict(), "rows": rows.count}, grid, *([single] if count else []), verdict
    )
