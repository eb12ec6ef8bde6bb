"""`lora-merge export`: a mixture for tools that know no gates."""

from pathlib import Path

import click

from lora_merge.cli.shared.options import force_option, json_option


@click.command(
    epilog="""\b
Examples:
  lora-merge export mix --to experts -o folders
  lora-merge export mix --to static -w 0.5 -w 0.3 -w 0.2 --rank 16 -o merged
  lora-merge export mix --to xlora --base ./llama -o for-peft
""",
    short_help="Write a mixture for tools that know no gates.",
)
@click.argument("mixture", type=click.Path(path_type=Path))
@click.option("--to", "kind", type=click.Choice(["experts", "static", "xlora"]), required=True)
@click.option("-w", "--weight", "weights", type=float, multiple=True, help="static: per expert.")
@click.option("--rank", type=click.IntRange(min=1), help="static: largest rank.  [default: all]")
@click.option("--base", help="xlora: base model, whose class tells the order of layers.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="To make.")
@force_option("a directory")
@json_option
def command(
    mixture: Path,
    kind: str,
    weights: tuple[float, ...],
    rank: int | None,
    base: str | None,
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Write MIXTURE as plain adapters.

    \b
    experts  one LoRA folder per expert, for engines that choose by request
    static   one LoRA, the gate held still at the weights (default 1/N each)
    xlora    PEFT's X-LoRA layout, as PEFT 0.19 and earlier read it
    """  # noqa: D301 -- click's mark is the character itself
    from lora_merge.cli.shared.open import check_out
    from lora_merge.cli.shared.output import Output, percent
    from lora_merge.mixture.formats.plain import export_experts, export_static
    from lora_merge.mixture.formats.xlora import export_xlora
    from lora_merge.mixture.mixture import Mixture
    from lora_merge.mixture.training.base_model import layer_order

    output = Output(as_json)
    if kind != "static" and (weights or rank):
        raise click.UsageError("--weight and --rank belong to --to static")
    if (base is not None) != (kind == "xlora"):
        raise click.UsageError("--to xlora needs --base, and nothing else does")
    check_out(out, mixture, base, force=force)
    opened = Mixture.from_pretrained(mixture)
    error = 0.0
    lines = [f"{out}: {kind}"]
    if kind == "experts":
        folders = export_experts(opened, out, force=force)
        lines = [str(folder) for folder in folders]
    elif kind == "static":
        error = export_static(opened, out, weights=weights or None, rank=rank, force=force)
        lines = [f"{out}: one adapter, {percent(error)} off the mixture held still"]
    elif base is not None:
        export_xlora(opened, out, layer_order(base, opened.modules), force=force)
    output.data({"schema": 1, "out": str(out), "kind": kind, "error": error}, *lines)
