"""`lora-merge convert`: from any dialect to any file format."""

from typing import TYPE_CHECKING, Any

import click

from lora_merge.api.arguments.reshaping import Convert
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import OUT, dry_run_option, json_option, take_out

if TYPE_CHECKING:
    from lora_merge.reshape.convert import ConvertReport


@click.command(
    epilog="""\b
Examples:
  lora-merge convert loha -o lora
  lora-merge convert adapter -o for-mlx --to mlx
  lora-merge convert adapter -o for-llama.cpp --to gguf --base llama
  lora-merge convert hra -o lora --base llama
  lora-merge convert oft -o lora --base llama --energy 0.99
  lora-merge convert flux.safetensors -o out --to diffusers --pipeline Flux
""",
)
@click.argument("adapter")
@options_of(Convert, about=OUT)
@dry_run_option
@json_option
def command(adapter: str, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Write ADAPTER in another format: exactly where its form is low-rank.

    Forms of full rank (DoRA, OFT, IA3 ...) need --rank or --energy, and the error is told.
    """
    take_out(given, dry_run)
    import lora_merge
    from lora_merge.cli.shared.api import run_shown, show_notes
    from lora_merge.cli.shared.output import Output

    output = Output(as_json)
    if dry_run:
        plan = lora_merge.plan_convert(adapter, **given)
        show_notes(output, plan)
        report = plan.report()
    else:
        report = run_shown(output, lora_merge.convert, adapter, **given).report
    output.data(report.to_dict(), *_view(report))


def _view(report: "ConvertReport") -> list[Any]:
    from collections import Counter

    from lora_merge.cli.shared.output import size
    from lora_merge.cli.shared.table import table
    from lora_merge.cli.views.format import dashed

    grid = table("verdict", "modules", "units", "rank", "relative error")
    for verdict, count in sorted(Counter(m.verdict for m in report.modules).items()):
        some = [m for m in report.modules if m.verdict == verdict]
        errors = [m.lost / m.norm for m in some if m.norm]
        units, ranks = [m.units for m in some], [m.rank for m in some]
        grid.add_row(
            verdict,
            str(count),
            dashed(units),
            dashed(ranks),
            f"up to {max(errors):.3g}" if errors else "not cut",
        )
    where = f"wrote {report.out}" if report.out else "would write"
    total = f", cutting lost {100 * report.error:.3g} % of the norm" if report.error else ""
    return [
        f"{report.dialect} to {report.target}: {len(report.modules)} modules{total}",
        grid,
        f"{where} ({size(report.num_bytes)})",
    ]
