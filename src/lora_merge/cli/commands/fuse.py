"""`lora-merge fuse`: an adapter and its base as one model."""

from typing import TYPE_CHECKING, Any

import click

from lora_merge.api.arguments.reshaping import Fuse
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import json_option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_merge.reshape.fuse import FuseReport


@click.command(
    epilog="""\b
Examples:
  lora-merge fuse merged --base Llama-3-8B -o Llama-3-8B-merged
  lora-merge fuse user/adapter --base ./base -w 0.5 -o out --json
""",
)
@click.argument("adapter")
@options_of(Fuse)
@json_option
def command(adapter: str, as_json: bool, **given: Any) -> None:
    """Write the base model with the ADAPTER in it, shard by shard, in the base's dtype.

    Memory stays within one band of a tensor, whatever the model's size. Tokenizer and configuration
    are copied (the adapter's own tokenizer, if it brings one), a model card is written; the result
    loads like the base and needs no PEFT.
    """
    import lora_merge
    from lora_merge.cli.shared.api import run_shown
    from lora_merge.cli.shared.output import Output

    output = Output(as_json)
    report = run_shown(output, lora_merge.fuse, adapter, **given)
    output.data(report.to_dict(), *_view(report))


def _view(report: "FuseReport") -> "list[RenderableType]":
    from rich.text import Text

    from lora_merge.cli.shared.output import percent, size

    counts = [f"{report.modules} modules changed by {percent(report.relative_change)}"]
    for what in ("replaced", "added", "untied"):
        names = getattr(report, what)
        if names:
            counts.append(f"{len(names)} tensors {what}")
    return [Text(f"wrote {report.out} ({size(report.num_bytes)}): {', '.join(counts)}")]
