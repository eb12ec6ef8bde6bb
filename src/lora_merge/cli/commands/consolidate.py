"""`lora-merge consolidate`: a few experts, or one adapter, from a mixture."""

from pathlib import Path
from typing import Any

import click

from lora_merge.api.arguments.texts import Consolidate, Texts
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import json_option
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
@options_of(Consolidate, only=("experts", "rank"))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="To make.")
@options_of(Consolidate, only=("force",))
@json_option
def command(mixture: Path, experts: int, out: Path, as_json: bool, **given: Any) -> None:
    """Run MIXTURE over the texts in DATA, group its experts by usage and merge each group.

    With --experts 1 (the default) the result is a plain LoRA adapter without a gate: the mixture
    held still at its mean weights. With more it is a mixture again, and a learned gate of it should
    be trained once more.
    """
    import lora_merge
    from lora_merge.cli.shared.output import Output, percent

    output, rank = Output(as_json), given["rank"]
    done = lora_merge.consolidate(mixture, experts=experts, out=out, **given, on_data=Rows(output))
    if done.mixture is not None and not done.mixture.spec.trained:
        output.note(f"its gate is a mean of the old one's; better: lora-merge train {out}")
    what = "a plain adapter" if done.mixture is None else f"a mixture of {experts} experts"
    lines = [f"wrote {out}: {what}", *(f"  {' + '.join(group)}" for group in done.groups)]
    lines.append(f"cut to rank {rank}: error {percent(done.error)}" if rank else "all ranks kept")
    output.data({**done.to_dict(), "out": str(out), "rank": rank}, *lines)
