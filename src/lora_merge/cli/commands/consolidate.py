"""`lora-merge consolidate`: a few experts, or one adapter, from a mixture."""

from pathlib import Path
from typing import Any

import click

from lora_merge.api.arguments.texts import Texts
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import force_option, json_option
from lora_merge.cli.shared.texts import Rows, mixture_argument


@click.command(
    epilog="""\b
Examples:
  lora-merge consolidate mix --base ./llama --data a.jsonl --experts 2 -o two
  lora-merge consolidate mix --base ./llama --data a.jsonl --rank 16 -o one
""",
)
@mixture_argument
@options_of(Texts)
@click.option(
    "--experts", type=click.IntRange(min=1), default=1, show_default=True, help="How many remain."
)
@click.option("--rank", type=click.IntRange(min=1), help="Largest rank of each.  [default: all]")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="To make.")
@force_option("a directory")
@json_option
def command(
    mixture: Path,
    experts: int,
    rank: int | None,
    out: Path,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Run MIXTURE over the texts in DATA, group its experts by usage and merge each group.

    With --experts 1 (the default) the result is a plain LoRA adapter without a gate: the mixture
    held still at its mean weights. With more it is a mixture again, and a learned gate of it should
    be trained once more.
    """
    import lora_merge
    from lora_merge.cli.shared.open import check_out
    from lora_merge.cli.shared.output import Output, percent

    output = Output(as_json)
    check_out(out, mixture, given["base"], given["data"], force=force)
    opened = lora_merge.Mixture.from_pretrained(mixture)
    usage = lora_merge.usage(opened, **given, on_data=Rows(output))
    if experts == 1:
        done = lora_merge.export(opened, out, "static", weights=usage, rank=rank, force=force)
        groups: tuple[tuple[str, ...], ...] = (tuple(opened.names),)
        error, what = done.error, "a plain adapter"
    else:
        small = lora_merge.consolidate(opened, usage, experts=experts, rank=rank)
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
