"""`lora-merge novelty`: do texts need an expert that a mixture does not have?"""

from pathlib import Path

import click

from lora_merge.cli._options import json_option


@click.command(
    epilog="""\b
Examples:
  lora-merge novelty described --base ./llama --data new.jsonl
""",
    short_help="Say whether texts need a new expert.",
)
@click.argument("mixture", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="Base model: a directory or a Hub id.")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSON lines.")
@click.option(
    "--threshold",
    type=float,
    default=1.5,
    show_default=True,
    help="Deviations above an expert's own texts that are strange.",
)
@click.option("--max-length", type=click.IntRange(min=2), default=512, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
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
    from lora_merge.cli._output import Output, table
    from lora_merge.mixture import Mixture
    from lora_merge.mixture.base import load_base
    from lora_merge.mixture.data import read_examples
    from lora_merge.mixture.descriptors import novelty

    output = Output(as_json)
    opened = Mixture.from_pretrained(mixture)
    model, tokenizer = load_base(base, device)
    rows = read_examples(data, tokenizer, experts=opened.names, max_length=max_length)
    for fault in rows.faults[:5]:
        output.note(f"left out: {fault}")
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
