"""`lora-merge novelty`: do texts need an expert that a mixture does not have?"""

from pathlib import Path
from typing import Any

import click

from lora_merge.api.arguments.texts import Novelty
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import json_option
from lora_merge.cli.shared.texts import Rows, mixture_argument


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
    """Compare the texts in DATA, of one kind, with what each expert of MIXTURE knows.

    Scores are deviations above the reconstruction error of the expert's own texts. If at some
    module every score is above the threshold, no expert knows the texts.
    """
    import lora_merge
    from lora_merge.cli.shared.output import Output, table

    output = Output(as_json)
    rows = Rows(output)
    found = lora_merge.novelty(mixture, **given, on_data=rows)
    grid = table("module", *found.experts)
    for module, row in zip(found.modules, found.scores, strict=True):
        grid.add_row(module, *(f"{score:.1f}" for score in row))
    verdict = (
        f"a new expert is needed: at {found.strangest} none knows these texts"
        if found.is_new
        else "these texts are known"
    )
    output.data({**found.to_dict(), "rows": rows.count}, grid, verdict)
