"""`lora-merge novelty`: do texts need an expert that a mixture does not have?"""

from pathlib import Path

import click

from lora_merge.cli.shared.options import json_option
from lora_merge.cli.shared.texts import batch_options, load_texts, text_options


@click.command(
    epilog="""\b
Examples:
  lora-merge novelty described --base ./llama --data new.jsonl
""",
    short_help="Say whether texts need a new expert.",
)
@text_options
@click.option(
    "--threshold",
    type=float,
    default=1.5,
    show_default=True,
    help="Deviations above an expert's own texts that are strange.",
)
@batch_options
@json_option
def command(
    mixture: Path,
    base: str,
    data: Path,
    threshold: float,
    max_length: int,
    batch_size: int,
    device: str,
    as_json: bool,
) -> None:
    """Compare the texts in DATA, of one kind, with what each expert of MIXTURE knows.

    Scores are deviations above the reconstruction error of the expert's own texts. If at some
    module every score is above the threshold, no expert knows the texts.
    """
    from lora_merge.cli.shared.output import Output, table
    from lora_merge.mixture.insight.novelty import novelty

    output = Output(as_json)
    opened, model, rows = load_texts(
        output, mixture, base=base, data=data, max_length=max_length, device=device
    )
    found = novelty(model, opened, rows.examples, threshold=threshold, batch_size=batch_size)
    result = {
        "schema": 1,
        "new": found.is_new,
        "strangest": found.strangest,
        "threshold": threshold,
        "rows": len(rows.examples),
        "scores": {
            module: dict(zip(found.experts, row, strict=True))
            for module, row in zip(found.modules, found.scores, strict=True)
        },
    }
    grid = table("module", *found.experts)
    for module, row in zip(found.modules, found.scores, strict=True):
        grid.add_row(module, *(f"{score:.1f}" for score in row))
    verdict = (
        f"a new expert is needed: at {found.strangest} none knows these texts"
        if found.is_new
        else "these texts are known"
    )
    output.data(result, grid, verdict)
