"""`lora-merge describe`: what each expert's texts look like inside the base model."""

from pathlib import Path

import click

from lora_merge.cli.shared.options import force_option, json_option
from lora_merge.cli.shared.texts import batch_options, load_texts, text_options


@click.command(
    epilog="""\b
Examples:
  lora-merge describe mix --base ./llama --data labelled.jsonl -o described
  lora-merge novelty described --base ./llama --data new.jsonl
""",
    short_help="Learn what each expert's texts look like.",
)
@text_options
@click.option("--rank", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--module", "modules", multiple=True, help="Where.  [default: once per layer]")
@batch_options
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="To make.")
@force_option("a mixture directory")
@json_option
def command(
    mixture: Path,
    base: str,
    data: Path,
    rank: int,
    modules: tuple[str, ...],
    max_length: int,
    batch_size: int,
    device: str,
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Write MIXTURE again with a descriptor of each expert that has rows in DATA.

    `lora-merge novelty` then tells whether other texts need an expert that is not there yet.
    """
    from lora_merge.cli.shared.open import check_out
    from lora_merge.cli.shared.output import Output
    from lora_merge.mixture.insight.novelty import describe

    output = Output(as_json)
    check_out(out, mixture, base, data, force=force)
    opened, model, rows = load_texts(
        output, mixture, base=base, data=data, max_length=max_length, device=device
    )
    known = describe(
        model, opened, rows.examples, modules=modules or None, rank=rank, batch_size=batch_size
    )
    opened.descriptors = known
    opened.save_pretrained(out, force=force)
    result = {
        "schema": 1, "out": str(out), "experts": list(known.experts), "modules": known.modules
    }  # fmt: skip
    line = f"wrote {out}: {', '.join(known.experts)} described at {len(known.modules)} modules"
    output.data(result, line)
