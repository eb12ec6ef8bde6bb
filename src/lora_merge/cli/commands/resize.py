"""`lora-merge resize`: fewer ranks, chosen from the spectra."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_merge.cli.shared.open import check_out, open_single
from lora_merge.cli.shared.options import force_option, json_option, open_options
from lora_merge.cli.shared.rule_options import rule_options, take_rule

if TYPE_CHECKING:
    from lora_merge.adapters.adapter import Adapter
    from lora_merge.adapters.measured.spectra import AdapterSpectra
    from lora_merge.ranks.choose import RankPlan

_PRUNE = "prune-gates"
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@click.command(
    epilog="""\b
Examples:
  lora-merge resize ADAPTER -o small           95 % of the energy per module
  lora-merge resize ADAPTER -o small --budget x0.5 --dry-run
  lora-merge resize ADAPTER -o small --rank 8 --dtype bfloat16
""",
    short_help="Lower an adapter's ranks, by energy, budget or another rule.",
)
@click.argument("adapter")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Directory to make.")
@rule_options
@click.option("--nested", is_flag=True, help="With --rank: the first units as stored (DyLoRA).")
@click.option("--prune-gates", is_flag=True, help="Drop units of gate zero (AdaLoRA, SoRA).")
@click.option("--exact", is_flag=True, help="Spread a budget by dynamic programming.")
@click.option(
    "--objective",
    type=click.Choice(["absolute", "relative", "base-relative"]),
    default="absolute",
    show_default=True,
    help="What a budget minimises: squared error, or that over the delta's or the base's norm.",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path, exists=True),
    help="Base model's directory, for base-relative.",
)
@click.option(
    "--bottleneck",
    type=click.Path(path_type=Path, exists=True),
    metavar="STATS",
    help="Keep output energy on calibration data instead of sum s^2 (see the documentation).",
)
@click.option(
    "--fisher",
    type=click.Path(path_type=Path, exists=True),
    metavar="STATS",
    help="The same, outputs weighted by their Fisher information.",
)
@click.option("--min-rank", type=click.IntRange(min=1), default=1, help="Smallest rank.")
@click.option("--max-rank", type=click.IntRange(min=1), help="Largest rank.")
@click.option("--round-to", type=click.IntRange(min=1), default=1, help="Round ranks up to this.")
@click.option("--drop-empty", is_flag=True, help="Let a module have rank 0 and drop it.")
@click.option("--uniform", is_flag=True, help="Pad all modules to the largest rank.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="[default: the adapter's]")
@force_option("an adapter directory")
@click.option("--dry-run", is_flag=True, help="Show the plan as a difference, write nothing.")
@click.option("--list", "each", is_flag=True, help="In a plan, list every module.")
@click.option("--width", type=click.IntRange(min=60), help="Columns.  [default: the terminal's]")
@open_options
@json_option
def command(adapter: str, **arguments: Any) -> None:
    """Write ADAPTER with new ranks: the best approximation of every delta at its rank.

    Prints truncation and rounding error apart. Energy is a proxy: measure the task afterwards.
    """
    rule = take_rule(arguments, "prune_gates")
    _refuse_combinations(rule, arguments)
    _run(adapter, rule, **arguments)


def _refuse_combinations(rule: str, given: dict[str, Any]) -> None:
    """Options that would be ignored beside others are refused."""
    stored = "--nested" if given["nested"] else "--prune-gates" if rule == _PRUNE else None
    if given["nested"] and not rule.startswith("fixed:"):
        raise click.UsageError("--nested needs --rank")
    if stored and (given["bottleneck"] or given["fisher"]):
        raise click.UsageError(f"{stored} keeps units as they are: it takes no statistics")
    if rule == _PRUNE and (given["max_rank"] or given["min_rank"] > 1 or given["round_to"] > 1):
        raise click.UsageError(
            "--prune-gates keeps every unit that adds something: it takes no --min-rank, "
            "--max-rank or --round-to; resize its result"
        )
    if given["drop_empty"] and given["min_rank"] > 1:
        raise click.UsageError("--drop-empty allows rank 0, --min-rank does not")
    if given["max_rank"] and given["min_rank"] > given["max_rank"]:
        raise click.UsageError("--min-rank is above --max-rank")
    if given["exact"] and not rule.startswith("budget:"):
        raise click.UsageError("--exact needs --budget")
    if given["objective"] != "absolute" and not rule.startswith(("budget:", "match:")):
        raise click.UsageError("--objective needs --budget or --match")
    if given["bottleneck"] and given["fisher"]:
        raise click.UsageError("give --bottleneck or --fisher, not both")
    if (given["objective"] == "base-relative") != (given["base"] is not None):
        raise click.UsageError("--objective base-relative and --base belong together")
    if given["out"] is None and not given["dry_run"]:
        raise click.UsageError("missing option '-o' (or --dry-run)")


def _run(
    ref: str,
    rule: str,
    *,
    out: Path | None,
    bottleneck: Path | None,
    fisher: Path | None,
    uniform: bool,
    dtype: str | None,
    force: bool,
    dry_run: bool,
    each: bool,
    width: int | None,
    alpha: float | None,
    rslora: bool,
    rename: tuple[str, ...],
    allow_pickle: bool,
    as_json: bool,
    **limits: Any,
) -> None:
    from lora_merge.adapters.measured.spectra import adapter_spectra, require_finite
    from lora_merge.cli.shared.output import Output
    from lora_merge.reshape.resize import plan_resize, resize

    output = Output(as_json, width=width)
    if out is not None and not dry_run:
        check_out(out, ref, bottleneck, fisher, limits["base"], force=force)
    adapter = open_single(ref, alpha=alpha, rslora=rslora, allow_pickle=allow_pickle, rename=rename)
    with output.progress("measuring", len(adapter.modules)) as advance:
        spectra = adapter_spectra(adapter, keep_cores=True, on_module=advance)
    require_finite(spectra)
    stats = bottleneck or fisher
    if stats is not None:
        from lora_merge.analysis.weighted_spectra import read_moments, weigh_spectra

        spectra = weigh_spectra(adapter, spectra, read_moments(stats), fisher=fisher is not None)
    plan = _plan(adapter, spectra, rule, **limits)
    target = plan_resize(
        adapter,
        spectra,
        plan,
        dtype=_DTYPES[dtype] if dtype else None,
        layout="uniform" if uniform else "per-module",
    )
    from lora_merge.cli.views import resize as view

    if dry_run or out is None:
        document = {"schema": 1, "plan": plan.to_dict(), "bytes": target.num_bytes}
        shown = view.plan_view(plan, width=output.width, plain=output.plain, each=each)
        output.data(document, shown, view.output_view(plan, target))
        return
    with output.progress("writing", len(plan.ranks)) as advance:
        report = resize(adapter, spectra, plan, target, out, force=force, on_module=advance)
    output.data(report.to_dict(), view.report_view(report, target))


def _plan(
    adapter: "Adapter",
    spectra: "AdapterSpectra",
    rule: str,
    *,
    nested: bool,
    exact: bool,
    objective: str,
    base: Path | None,
    min_rank: int,
    max_rank: int | None,
    round_to: int,
    drop_empty: bool,
) -> "RankPlan":
    from lora_merge.ranks.choose import choose_ranks
    from lora_merge.reshape.stored_units import nested_plan, prune_plan

    smallest = 0 if drop_empty else min_rank
    if rule == _PRUNE:
        return prune_plan(adapter, spectra, min_rank=smallest)
    weights = None
    if objective == "relative":
        weights = _weights(spectra.by_module)
    elif base is not None:
        from lora_merge.analysis.beside_base import base_weights
        from lora_merge.files.checkpoint import open_checkpoint

        weights = base_weights(adapter, open_checkpoint(base))
    plan = choose_ranks(
        spectra.by_module,
        spectra.costs,
        rule,
        before=spectra.ranks,
        min_rank=smallest,
        max_rank=max_rank,
        round_to=round_to,
        weights=weights,
        exact=exact,
    )
    return nested_plan(adapter, spectra, plan.ranks) if nested else plan


def _weights(spectra: Any) -> dict[str, float]:
    """Weights that make every module's relative error count the same."""
    energies = {name: float(values.square().sum()) for name, values in spectra.items()}
    return {name: 1 / energy if energy > 0 else 1.0 for name, energy in energies.items()}
