"""`lora-merge fuse`: an adapter and its base as one model."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_merge.cli.shared.options import force_option, json_option, open_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_merge.reshape.fuse import FuseReport


@click.command(
    epilog="""\b
Examples:
  lora-merge fuse merged --base Llama-3-8B -o Llama-3-8B-merged
  lora-merge fuse user/adapter --base ./base -w 0.5 -o out --json
""",
    short_help="Write base model + adapter as one model.",
)
@click.argument("adapter")
@click.option(
    "--base",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Directory of the base model, in safetensors.",
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Directory to make."
)
@click.option(
    "-w", "--weight", type=float, default=1.0, show_default=True, help="Scales the delta."
)
@force_option("a model or adapter directory")
@open_options
@json_option
def command(
    adapter: str,
    base: Path,
    out: Path,
    weight: float,
    alpha: float | None,
    rslora: bool,
    rename: tuple[str, ...],
    force: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Write the base model with the ADAPTER in it, shard by shard, in the base's dtype.

    Memory stays within one band of a tensor, whatever the model's size. Tokenizer and configuration
    are copied (the adapter's own tokenizer, if it brings one), a model card is written; the result
    loads like the base and needs no PEFT.
    """
    from lora_merge.cli.shared.open import check_out, open_single
    from lora_merge.cli.shared.output import Output
    from lora_merge.reshape.fuse import fuse

    output = Output(as_json)
    check_out(out, adapter, base, force=force)
    opened = open_single(
        adapter, alpha=alpha, rslora=rslora, allow_pickle=allow_pickle, rename=rename
    )
    with output.progress("fusing", len(opened.modules)) as advance:
        report = fuse(opened, base, out, weight=weight, force=force, on_module=advance)
    for note in report.notes:
        output.note(note)
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
