"""The options of merging commands, the recipe they mean, and the one way to run it."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import WeightType, open_options, run_options, together
from lora_merge.merge.recipe.recipe import Recipe, Semantics

if TYPE_CHECKING:
    from lora_merge.cli.shared.output import Output
    from lora_merge.merge.plan import MergePlan
    from lora_merge.merge.report import MergeReport

_RUN_OPTIONS = (
    *("out", "force", "device", "jobs", "shard", "resume", "dry_run", "as_json", "allow_pickle"),
)


class ScaleType(click.ParamType):  # type: ignore[type-arg]
    """A number, or "auto"."""

    name = "number|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The number, or the word."""
        try:
            return value if value == "auto" else float(value)
        except ValueError:
            self.fail(f"{value!r} is no number; auto lets the adapters decide", param, ctx)


# A recipe that says nothing means 1; who types a command and says nothing leaves it to us.
scale_option = click.option(
    "--scale",
    type=ScaleType(),
    default="auto",
    show_default=True,
    help="Factor on the merged delta; auto is decided from the adapters and the method, 1 is the "
    "method as published.",
)
semantics_options = together(
    scale_option,
    options_of(Semantics, without=("scale",)),
    options_of(Recipe, only=("statistics",)),
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
    options_of(Recipe, only=("seed", "dtype", "ranks", "extras", "accept_base_models", "base")),
    run_options,
)


def split_run_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take those options out of `arguments` that say how to run and not what to make."""
    return {name: arguments.pop(name) for name in _RUN_OPTIONS}


def parse_parameters(pairs: Sequence[str]) -> list[tuple[str, Any]]:
    """`name=value` arguments; values are YAML."""
    import yaml

    parameters = []
    for pair in pairs:
        name, separator, value = pair.partition("=")
        try:
            loaded = yaml.safe_load(value)
        except yaml.YAMLError:
            separator = ""
        if not separator:
            raise click.UsageError(f"-p {pair!r}: write NAME=VALUE")
        parameters.append((name.strip().replace("-", "_"), loaded))
    return parameters


def _shared_and_own(
    given: Iterable[tuple[str, Any]], count: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Parameters given once hold for all adapters; given once per adapter, each for its own."""
    values: dict[str, list[Any]] = {}
    for name, value in given:
        values.setdefault(name, []).append(value)
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, several in values.items():
        if len(several) == 1:
            shared[name] = several[0]
        elif len(several) == count:
            for mapping, value in zip(own, several, strict=True):
                mapping[name] = value
        else:
            raise click.UsageError(
                f"{name} is given {len(several)} times for {count} adapters; give it once for all, "
                "or once per adapter in their order"
            )
    return shared, own


def recipe_from(
    method: str,
    *,
    adapters: Sequence[str],
    weights: Sequence[Any],
    rank: int | str | None,
    parameters: Iterable[tuple[str, Any]],
    alpha: float | None,
    rslora: bool,
    **settings: Any,
) -> Recipe:
    """The recipe that a command line means.

    Args:
        method: Name of the method.
        adapters: References as given; globs may stand for many.
        weights: One per adapter, or none.
        rank: Rank or rank rule.
        parameters: Parameters of the method; those at their default are left out, those given
            once per adapter are the adapters' own.
        alpha: lora_alpha of files without a config.
        rslora: Those files' scaling is alpha / sqrt(r).
        settings: Every other field of the recipe by name.
    """
    from lora_merge.adapters.references import expand
    from lora_merge.merge.methods.registry import find_method
    from lora_merge.merge.recipe.recipe import AdapterItem

    refs = expand(adapters)
    if weights and len(weights) != len(refs):
        raise click.UsageError(f"{len(weights)} weights (-w) for {len(refs)} adapters")
    shared, own = _shared_and_own(parameters, len(refs))
    if method != "auto":
        chosen = find_method(method)
        varying = {n for n in shared if n in chosen.per_adapter and isinstance(shared[n], list)}
        chosen.parse({n: v for n, v in shared.items() if n not in varying})
        defaults = chosen.parse({})
        shared = {n: v for n, v in shared.items() if n in varying or v != getattr(defaults, n)}
    rank = int(rank) if isinstance(rank, str) and rank.isdigit() else rank
    return Recipe(
        merge_method=method,
        adapters=tuple(
            AdapterItem(ref, weight, alpha=alpha, rslora=rslora, parameters=mapping)
            for ref, weight, mapping in zip(refs, weights or (1.0,) * len(refs), own, strict=True)
        ),
        rank=rank,
        parameters=shared,
        **settings,
    )


def run_merge(
    recipe: Recipe | Path,
    *,
    out: Path,
    force: bool,
    device: str,
    jobs: int | None,
    dry_run: bool,
    as_json: bool,
    allow_pickle: bool,
    strict: bool = False,
    shard: str | None = None,
    resume: bool = False,
) -> None:
    """Plan a recipe, run it and show what happened; every merging command ends here."""
    from lora_merge.cli.shared.output import Output
    from lora_merge.machine.device import pick_device
    from lora_merge.merge.api import plan_recipe, run_recipe

    output = Output(as_json)
    pick_device(device)
    if dry_run:
        _show_plan(plan_recipe(recipe, allow_pickle=allow_pickle, device=device), output, jobs)
        return
    if shard is not None:
        _run_shard(recipe, out, shard, output, force, resume, allow_pickle, jobs, device)
        return
    with ExitStack() as showing:
        shown = Progress(output, showing)
        report = run_recipe(
            recipe,
            out,
            force=force,
            strict=strict,
            resume=resume,
            allow_pickle=allow_pickle,
            jobs=jobs,
            device=device,
            on_plan=shown.begin,
            on_module=lambda _: shown.advance(),
        )
    show_report(report, output, shown.notes)


def show_report(report: "MergeReport", output: "Output", seen: Sequence[str]) -> None:
    """A merge's report, and those of its notes that have not been seen."""
    from lora_merge.cli.views.merge import report_view

    for note in report.notes[len(seen) :]:
        output.note(note)
    output.data(report.to_dict(), *report_view(report))


def _run_shard(recipe: Recipe | Path, out: Path, shard: str, output: "Output", *how: Any) -> None:
    from rich.markup import escape

    from lora_merge.merge.shards.shard import run_shard

    names = ("force", "resume", "allow_pickle", "jobs", "device")
    with ExitStack() as showing:
        shown = Progress(output, showing)
        report = run_shard(
            recipe,
            out,
            shard,
            **dict(zip(names, how, strict=True)),
            on_plan=shown.begin,
            on_module=lambda _: shown.advance(),
        )
    output.data(report.to_dict(), escape(str(report.summary())))


class Progress:
    """What is shown while a plan runs: its notes, and a bar of its modules."""

    def __init__(self, output: "Output", showing: ExitStack) -> None:
        self.output, self.showing = output, showing
        self.notes: tuple[str, ...] = ()

    def begin(self, plan: "MergePlan", modules: int | None = None) -> None:
        """Show the notes, and a bar for all modules or for so many."""
        from lora_merge.cli.shared.malloc import return_large_blocks

        self.notes = plan.notes
        for note in plan.notes:
            self.output.note(note)
        return_large_blocks(plan.peak_bytes(1))
        count = len(plan.alignment.modules) if modules is None else modules
        bar = self.output.progress("merging", count)
        self.advance = self.showing.enter_context(bar)


def _show_plan(plan: "MergePlan", output: "Output", jobs: int | None) -> None:
    from lora_merge.cli.views.merge import plan_data, plan_view
    from lora_merge.machine.parallel import default_jobs

    for note in plan.notes:
        output.note(note)
    workers = jobs or default_jobs()
    output.data(plan_data(plan, workers), *plan_view(plan, workers))


def explain_clusters(
    recipe: Recipe,
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
    from lora_merge.merge.api import plan_recipe
    from lora_merge.merge.clusters import clusters_of
    from lora_merge.merge.executor import execute

    output = Output(as_json)
    plan = plan_recipe(recipe, allow_pickle=allow_pickle, device=device)
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
