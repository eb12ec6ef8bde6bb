"""`lora-merge extract`: a LoRA from two full checkpoints."""

from typing import TYPE_CHECKING, Any

import click

from lora_merge.api.arguments.reshaping import Extract
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import OUT, dry_run_option, json_option, take_out
from lora_merge.cli.shared.rule_options import rule_options, take_rule

if TYPE_CHECKING:
    from lora_merge.reshape.extract import ExtractReport


@click.command(
    epilog="""\b
Examples:
  lora-merge extract --base llama --tuned llama-chat -o adapter
  lora-merge extract --base a --tuned b -o out --rank 32 --include '*_proj'
""",
)
@options_of(Extract, only=("base", "tuned", "out"), about=OUT)
@rule_options
@options_of(
    Extract,
    without=("base", "tuned", "out"),
    about={"layout": "write rank_pattern instead of padding to one rank"},
)
@dry_run_option
@json_option
def command(dry_run: bool, as_json: bool, **given: Any) -> None:
    """Write the leading part of every weight's difference between two checkpoints as a LoRA.

    What is not extracted (norms, biases, embeddings, resized or new tensors) is reported.
    """
    rule = take_rule(given)
    take_out(given, dry_run)
    import lora_merge
    from lora_merge.cli.shared.api import run_shown
    from lora_merge.cli.shared.output import Output

    output = Output(as_json)
    if dry_run:
        plan = lora_merge.plan_extract(rule=rule, **given)
        output.data(plan.to_dict(), str(plan.summary()))
        return
    report = run_shown(output, lora_merge.extract, rule=rule, **given).report
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
