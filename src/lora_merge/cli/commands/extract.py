"""`lora-merge extract`: a LoRA from two full checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_merge.cli.shared.options import force_option, json_option
from lora_merge.cli.shared.rule_options import rule_options, take_rule

if TYPE_CHECKING:
    from lora_merge.reshape.extract import ExtractReport

_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@click.command(
    epilog="""\b
Examples:
  lora-merge extract --base llama --tuned llama-chat -o adapter
  lora-merge extract --base a --tuned b -o out --rank 32 --include '*_proj'
""",
    short_help="A LoRA from a model and its fine-tuned version.",
)
@click.option("--base", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--tuned", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="To make.")
@rule_options
@click.option("--max-rank", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--no-denoise", is_flag=True, help="Do not cap ranks at the noise threshold.")
@click.option("--include", multiple=True, metavar="GLOB", help="Modules to extract. Repeatable.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Modules to leave out.")
@click.option("--base-name", help="Name of the base model for the adapter's config.")
@click.option("--uniform/--per-module", default=True, help="Pad all modules to one rank, or not.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="[default: the tuned model's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the randomised SVD.")
@force_option("an adapter directory")
@json_option
def command(as_json: bool, **arguments: Any) -> None:
    """Write the leading part of every weight's difference between two checkpoints as a LoRA.

    What is not extracted (norms, biases, embeddings, resized or new tensors) is reported.
    """
    rule = take_rule(arguments)
    from lora_merge.cli.shared.open import check_out
    from lora_merge.cli.shared.output import Output
    from lora_merge.files.checkpoint import open_checkpoint
    from lora_merge.reshape.coverage import survey
    from lora_merge.reshape.extract import extract

    output = Output(as_json)
    check_out(arguments["out"], arguments["base"], arguments["tuned"], force=arguments["force"])
    base, tuned = open_checkpoint(arguments.pop("base")), open_checkpoint(arguments.pop("tuned"))
    names, _ = survey(base, tuned, include=arguments["include"], exclude=arguments["exclude"])
    dtype = arguments.pop("dtype")
    with output.progress("extracting", len(names)) as advance:
        report = extract(
            base,
            tuned,
            arguments.pop("out"),
            rule,
            dtype=_DTYPES[dtype] if dtype else None,
            layout="uniform" if arguments.pop("uniform") else "per-module",
            denoise=not arguments.pop("no_denoise"),
            base_model=arguments.pop("base_name") or base.folder.name,
            on_module=advance,
            **arguments,
        )
    output.data(report.to_dict(), _view(report, output.width, output.plain))


def _view(report: "ExtractReport", width: int, plain: bool) -> Any:
    from rich.console import Group
    from rich.text import Text

    from lora_merge.cli.shared.output import size
    from lora_merge.cli.views.resize import rank_map

    plan = report.plan
    groups: dict[str, list[Any]] = {}
    for entry in report.coverage:
        groups.setdefault(entry.what, []).append(entry)
    lines = [
        f"{len(plan.modules)} weights, {100 * plan.energy:.2f} % of their squared difference in "
        f"{plan.parameters:,} parameters",
        f"{len(report.capped)} ranks capped at the noise threshold (Gavish-Donoho)",
    ]
    for what, entries in groups.items():
        if what == "extracted":
            continue
        changes = [e.change for e in entries if e.change]
        largest = f", change up to {100 * max(changes):.2g} %" if changes else ""
        shown = ", ".join(e.name for e in entries[:3]) + (", ..." if len(entries) > 3 else "")
        lines.append(f"{what}: {len(entries)} tensors{largest} ({shown})")
    lines.append(f"wrote {report.out} ({size(report.num_bytes)})")
    return Group(rank_map(plan, width), Text("\n".join(lines)))
