"""`lora-merge export`: a mixture for tools that know no gates."""

from pathlib import Path
from typing import Any

import click

from lora_merge.api.arguments.mixing import Export
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import json_option
from lora_merge.cli.shared.texts import mixture_argument


@click.command(
    epilog="""\b
Examples:
  lora-merge export mix --to experts -o folders
  lora-merge export mix --to static -w 0.5 -w 0.3 -w 0.2 --rank 16 -o merged
  lora-merge export mix --to xlora --base ./llama -o for-peft
""",
)
@mixture_argument
@options_of(Export)
@click.option("-w", "--weight", "weights", type=float, multiple=True, help="static: per expert.")
@json_option
def command(mixture: Path, weights: tuple[float, ...], as_json: bool, **given: Any) -> None:
    """Write MIXTURE as plain adapters.

    \b
    experts  one LoRA folder per expert, for engines that choose by request
    static   one LoRA, the gate held still at the weights (default 1/N each)
    xlora    PEFT's X-LoRA layout, as PEFT 0.19 and earlier read it
    """  # noqa: D301 -- click's mark is the character itself
    import lora_merge
    from lora_merge.cli.shared.output import Output, percent

    done = lora_merge.export(mixture, **given, weights=weights or None)
    lines = [f"{done.out}: {done.kind}"]
    if done.kind == "experts":
        lines = [str(folder) for folder in done.folders]
    elif done.kind == "static":
        lines = [f"{done.out}: one adapter, {percent(done.error)} off the mixture held still"]
    Output(as_json).data(done.to_dict(), *lines)
