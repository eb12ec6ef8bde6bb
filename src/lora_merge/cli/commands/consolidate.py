"""`lora-merge consolidate`: a few experts, or one adapter, from a mixture."""

from pathlib import Path

import click

from lora_merge.cli.shared.options import force_option, json_option
from lora_merge.cli.shared.texts import batch_options, load_texts, text_options


@click.command(
    epilog="""\b
Examples:
  lora-merge consolidate mix --base ./llama --data a.jsonl --experts 2 -o two
  lora-merge consolidate mix --base ./llama --data a.jsonl --rank 16 -o one
""",
    short_help="Merge a mixture's experts by how they are used.",
)
@text_options
@click.option(
    "--experts", type=click.IntRange(min=1), default=1, show_default=True, help="How many remain."
)
@click.option("--rank", type=click.IntRange(min=1), help="Largest rank of each.  [default: all]")
@batch_options
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="To make.")
@force_option("a directory")
@json_option
def command(
    mixture: Path,
    base: str,
    data: Path,
    experts: int,
    rank: int | None,
    max_length: int,
    batch_size: int,
    device: str,
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Run MIXTURE over the texts in DATA, group its experts by usage and merge each group.

    With --experts 1 (the default) the result is a plain LoRA adapter without a gate: the mixture
    held still at its mean weights. With more it is a mixture again, and a learned gate of it should
    be trained once more.
    """
    from lora_merge.cli.shared.open import check_out
    from lora_merge.cli.shared.output import Output, percent
    from lora_merge.mixture.formats.plain import export_static
    from lora_merge.mixture.insight.consolidate import consolidate
    from lora_merge.mixture.runtime.attach import load_mixture
    from lora_merge.mixture.training.base_model import watch_rows

    output = Output(as_json)
    check_out(out, mixture, base, data, force=force)
    opened, model, rows = load_texts(
        output, mixture, base=base, data=data, max_length=max_length, device=device
    )
    usage = watch_rows(model, load_mixture(model, opened), rows.examples, batch_size)
    if experts == 1:
        error = export_static(opened, out, weights=usage.mean_weights(), rank=rank, force=force)
        groups: tuple[tuple[str, ...], ...] = (tuple(opened.names),)
        what = "a plain adapter"
    else:
        small = consolidate(opened, usage, experts=experts, rank=rank)
        small.mixture.save_pretrained(out, force=force)
        groups, error, what = small.groups, small.error, f"a mixture of {experts} experts"
        if not small.mixture.spec.trained:
            output.note(f"its gate is a mean of the old one's; better: lora-merge train {out}")
    result = {
        "schema": 1,
        "out": str(out),
        "groups": [list(group) for group in groups],
        "error": error,
        "rank": rank,
    }
    lines = [f"wrote {out}: {what}", *(f"  {' + '.join(group)}" for group in groups)]
    lines.append(f"cut to rank {rank}: error {percent(error)}" if rank else "all ranks kept")
    output.data(result, *lines)
