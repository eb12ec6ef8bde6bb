"""The options of merging commands, the recipe they mean, and the one way to run it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_merge.adapters.access.opening import OpenOptions
from lora_merge.cli.shared.api import run_shown, show_notes, shown_progress
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import WeightType, dry_run_option, json_option, together
from lora_merge.merge.recipe.arguments import RunRecipe, RunShard
from lora_merge.merge.recipe.recipe import Recipe, Semantics

if TYPE_CHECKING:
    from lora_merge.cli.shared.output import Output
    from lora_merge.merge.report import MergeReport


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
_PLACES = ("devices", "engine", "address")
_HOW = ("out", "force", "device", "jobs", "resume", *_PLACES, "allow_pickle")
run_options = together(
    options_of(
        RunRecipe,
        only=_HOW,
        about={"out": "directory to make"},
        defaults={"out": Path("merged")},
    ),
    options_of(
        RunShard,
        only=("shard",),
        needed=False,
        about={
            "shard": "merge one part of the modules, 3/16, into OUT.shards; `lora-merge join OUT` "
            "makes OUT of all parts, the same bytes as one run"
        },
    ),
    dry_run_option,
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
    options_of(OpenOptions, without=("allow_pickle",)),
    options_of(
        Recipe,
        only=("seed", "dtype", "ranks", "extras", "experts", "accept_base_models", "base"),
    ),
    run_options,
)


def split_run_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take those options out of `arguments` that say how to run and not what to make."""
    return {name: arguments.pop(name) for name in (*_HOW, "shard", "dry_run", "as_json")}


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
    recipe: Recipe | Path, *, dry_run: bool, as_json: bool, shard: str | None, **how: Any
) -> None:
    """Run a recipe, or a shard of it, or show what it would make; all merging commands end here."""
    import lora_merge
    from lora_merge.cli.shared.output import Output

    output = Output(as_json)
    if dry_run:
        _show_plan(recipe, output, how)
    elif shard is not None:
        how.pop("strict", None)
        if any(how.pop(name) not in (None, "local") for name in _PLACES):
            raise click.UsageError("--shard is one part, here: leave --devices and --engine out")
        report = run_shown(output, lora_merge.run_shard, recipe, shard=shard, **how)
        from rich.markup import escape

        output.data(report.to_dict(), escape(str(report.summary())))
    else:
        show_report(run_shown(output, lora_merge.run_recipe, recipe, **how).report, output)


def show_report(report: "MergeReport", output: "Output") -> None:
    """A merge's report."""
    from lora_merge.cli.views.merge import report_view

    output.data(report.to_dict(), *report_view(report))


def _show_plan(recipe: Recipe | Path, output: "Output", how: dict[str, Any]) -> None:
    import lora_merge
    from lora_merge.cli.views.merge import plan_view
    from lora_merge.machine.device import pick_device, workers_on

    place = pick_device(how["device"])
    plan = lora_merge.plan_recipe(recipe, allow_pickle=how["allow_pickle"], device=how["device"])
    show_notes(output, plan)
    jobs = workers_on(place, how["jobs"], plan.peak_bytes)
    output.data(plan.to_dict(jobs), *plan_view(plan.merge, jobs, place))


def explain_clusters(recipe: Recipe, html: Path | None, *, as_json: bool, **how: Any) -> None:
    """Run a clustering in memory and show what its units are made of, as a page if asked to."""
    import lora_merge
    from lora_merge.cli.shared.output import Output
    from lora_merge.cli.views.clusters import clusters_data, clusters_view
    from lora_merge.files.pages.html_page import check_page, write_html
    from lora_merge.merge.clusters.members import clusters_of
    from lora_merge.merge.clusters.page import clusters_page

    output = Output(as_json)
    check_page(html)
    how = {name: how[name] for name in ("device", "jobs", "allow_pickle")}
    plan = lora_merge.plan_recipe(
        recipe, allow_pickle=how.pop("allow_pickle"), device=how["device"]
    )
    with shown_progress(output) as progress:
        report = plan.run(**how, progress=progress).report
    names = [adapter.name for adapter in plan.merge.alignment.adapters]
    clusters = clusters_of(report.modules)
    if html:
        write_html(clusters_page(clusters, names), html)
    output.data(clusters_data(clusters, names), *clusters_view(clusters, names))
