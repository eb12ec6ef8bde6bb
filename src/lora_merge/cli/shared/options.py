"""Options that several commands share, and the one way to run a merge from them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from lora_merge.merge.recipe.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])

adapters_argument = click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
pickle_option = click.option(
    "--allow-pickle", is_flag=True, help="Load .bin files (with weights_only=True)."
)
bases_option = click.option(
    "--accept-base-models", is_flag=True, help="Accept adapters that name different base models."
)


def force_option(what: str) -> Callable[[F], F]:
    """`--force`, which replaces an output that is there and does nothing else."""
    return click.option("--force", is_flag=True, help=f"Replace {what} that lora-merge wrote.")


class WeightType(click.ParamType):  # type: ignore[type-arg]
    """A number, or a YAML list of numbers or of {filter, value}."""

    name = "weight"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The weight as plain data."""
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
        import yaml

        try:
            data = yaml.safe_load(value)
        except yaml.YAMLError:
            data = None
        if not isinstance(data, list):
            self.fail(f"{value!r} is no number and no list", param, ctx)
        return data


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown in the order given."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


rename_option = click.option(
    "--rename",
    multiple=True,
    metavar="FROM=TO",
    help="Give modules below FROM the path TO, e.g. layers=model.layers.",
)

open_options = together(
    click.option("--alpha", type=float, help="lora_alpha of .safetensors files without a config."),
    click.option("--rslora", is_flag=True, help="Those files' scaling is alpha / sqrt(r)."),
    pickle_option,
    rename_option,
)

_result_options = together(
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float16", "bfloat16", "float64"]),
        help="Dtype of the result.  [default: the inputs']",
    ),
    click.option(
        "--ranks",
        type=click.Choice(["uniform", "per-module"]),
        default="uniform",
        show_default=True,
        help="Pad all modules to one rank, or write rank_pattern (vLLM and llama.cpp ignore it).",
    ),
    click.option(
        "--extras",
        type=click.Choice(["average", "first", "drop", "error"]),
        default="average",
        show_default=True,
        help="What to do with biases and modules that were saved whole.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of all randomness."),
    bases_option,
)

run_options = together(
    click.option(
        "-o",
        "--out",
        type=click.Path(path_type=Path),
        default=Path("merged"),
        show_default=True,
        help="Directory to make.",
    ),
    force_option("an adapter directory"),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1."),
    click.option("--jobs", type=click.IntRange(min=1), help="Worker threads.  [default: CPUs]"),
    click.option("--dry-run", is_flag=True, help="Plan from the headers, write nothing."),
    json_option,
)


merging_options = together(
    click.option(
        "-w",
        "--weight",
        "weights",
        type=WeightType(),
        multiple=True,
        help="Weight of an adapter; repeat it, in the adapters' order. May be negative.",
    ),
    open_options,
    _result_options,
    run_options,
)


def run_merge(
    recipe: "Recipe",
    *,
    out: Path,
    force: bool,
    device: str,
    jobs: int | None,
    dry_run: bool,
    as_json: bool,
    allow_pickle: bool,
    strict: bool = False,
) -> None:
    """Plan a recipe, run it and show what happened; every merging command ends here."""
    from lora_merge.cli.shared.malloc import return_large_blocks
    from lora_merge.cli.shared.open import check_out
    from lora_merge.cli.shared.output import Output
    from lora_merge.cli.views.merge import plan_data, plan_view, report_view
    from lora_merge.machine.device import pick_device
    from lora_merge.machine.parallel import default_jobs
    from lora_merge.merge.recipe.recipe import open_recipe, plan_recipe, resolved_recipe
    from lora_merge.merge.save import save_merge

    output = Output(as_json)
    pick_device(device)
    if not dry_run:
        named = (item.adapter for item in recipe.adapters)
        check_out(out, *named, recipe.statistics, force=force)
    recipe, adapters = open_recipe(recipe, allow_pickle=allow_pickle)
    plan = plan_recipe(recipe, adapters)
    for note in plan.notes:
        output.note(note)
    if dry_run:
        workers = jobs or default_jobs()
        output.data(plan_data(plan, workers), *plan_view(plan, workers))
        return
    return_large_blocks(plan.peak_bytes(1))
    with output.progress("merging", len(plan.alignment.modules)) as advance:
        report = save_merge(
            plan,
            out,
            recipe=lambda: resolved_recipe(recipe, plan, adapters),
            force=force,
            strict=strict,
            jobs=jobs,
            device=device,
            on_module=lambda _: advance(),
        )
    for note in report.notes[len(plan.notes) :]:
        output.note(note)
    output.data(report.to_dict(), *report_view(report))


def explain_clusters(
    recipe: "Recipe",
    *,
    device: str,
    jobs: int | None,
    as_json: bool,
    allow_pickle: bool,
    **_: Any,
) -> None:
    """Run a clustering in memory and show what its units are made of."""
    from lora_merge.adapters.in_memory import MemoryWriter
    from lora_merge.cli.shared.output import Output
    from lora_merge.cli.views.clusters import clusters_data, clusters_view
    from lora_merge.merge.clusters import clusters_of
    from lora_merge.merge.executor import execute
    from lora_merge.merge.recipe.recipe import open_recipe, plan_recipe

    output = Output(as_json)
    recipe, adapters = open_recipe(recipe, allow_pickle=allow_pickle)
    plan = plan_recipe(recipe, adapters)
    with output.progress("clustering", len(plan.alignment.modules)) as advance:
        reports = execute(
            plan,
            MemoryWriter(plan.output),
            jobs=jobs,
            device=device,
            on_module=lambda _: advance(),
        )
    names = [adapter.name for adapter in plan.alignment.adapters]
    clusters = clusters_of(reports)
    output.data(clusters_data(clusters, names), *clusters_view(clusters, names))
