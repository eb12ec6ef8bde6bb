"""`lora-merge resize`: fewer ranks, chosen from the spectra."""

from typing import Any

import click

from lora_merge.api.arguments.reshaping import Resize
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import OUT, dry_run_option, json_option, take_out, width_option
from lora_merge.cli.shared.rule_options import rule_options, take_rule


@click.command(
    epilog="""\b
Examples:
  lora-merge resize ADAPTER -o small           95 % of the energy per module
  lora-merge resize ADAPTER -o small --budget x0.5 --dry-run
  lora-merge resize ADAPTER -o small --rank 8 --dtype bfloat16
""",
)
@click.argument("adapter")
@options_of(Resize, only=("out",), about=OUT)
@rule_options
@click.option("--prune-gates", is_flag=True, help="Drop units of gate zero (AdaLoRA, SoRA).")
@options_of(Resize, without=("out",), about={"layout": "pad all modules to the largest rank"})
@dry_run_option
@click.option("--list", "each", is_flag=True, help="In a plan, list every module.")
@width_option
@json_option
def command(
    adapter: str, dry_run: bool, each: bool, width: int | None, as_json: bool, **given: Any
) -> None:
    """Write ADAPTER with new ranks: the best approximation of every delta at its rank.

    Prints truncation and rounding error apart. Energy is a proxy: measure the task afterwards.
    """
    rule = take_rule(given, "prune_gates")
    take_out(given, dry_run)
    import lora_merge
    from lora_merge.cli.shared.api import run_shown, shown_progress
    from lora_merge.cli.shared.output import Output
    from lora_merge.cli.views import resize as view

    output = Output(as_json, width=width)
    if not dry_run:
        report = run_shown(output, lora_merge.resize, adapter, rule, **given).report
        output.data(report.to_dict(), view.report_view(report))
        return
    with shown_progress(output) as progress:
        plan = lora_merge.plan_resize(adapter, rule, **given, progress=progress)
    shown = view.plan_view(plan.ranks, width=output.width, plain=output.plain, each=each)
    output.data(plan.to_dict(), shown, view.output_view(plan.output))
