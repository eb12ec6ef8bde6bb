"""`lora-merge compare`: which adapters agree, which conflict, and where."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from lora_merge.adapters.access.opening import BaseOptions
from lora_merge.api.arguments.looking import Compare, Neighbours
from lora_merge.cli.shared.fields import names_of, options_of
from lora_merge.cli.shared.options import Choice, adapters_argument, json_option, width_option

if TYPE_CHECKING:
    from lora_merge.adapters.adapter import Adapter
    from lora_merge.analysis.pairs.matrices import PairMatrices
    from lora_merge.cli.shared.output import Output

# Modules whose principal angles are shown; --json has all.
MOST_MODULES = 4
# Adapters from which on tables of pairs are what memory goes into.
MANY = 100


@click.command(
    epilog="""\b
Examples:
  lora-merge compare math code chat
  lora-merge compare math code --module '*.5.*'
  lora-merge compare 'runs/*' --cluster auto
  lora-merge compare 'runs/*' --html runs.html --svg runs.svg
  lora-merge compare 'runs/*' --cluster 4 --algorithm spectral --json
  lora-merge compare library --neighbours 5
""",
)
@adapters_argument
@click.option("--cluster", metavar="K|auto", help="Group the adapters before merging.")
@click.option(
    "--algorithm",
    type=Choice(["agglomerative", "spectral"]),
    default="agglomerative",
    show_default=True,
    help="How to group them.",
)
@options_of(
    Neighbours,
    only=("count",),
    unset=True,
    about={
        "count": "of very many adapters, only each one's K nearest, families and near-duplicates"
    },
)
@options_of(
    Compare,
    about={
        "modules": "only these modules, with all principal angles; repeatable",
        "per_module": "every module's matrices in --json",
    },
)
@width_option
@click.option("--svg", type=click.Path(path_type=Path), help="Draw cosines, interference and tree.")
@click.option("--png", type=click.Path(path_type=Path), help="The same as pixels.")
@click.option(
    "--html", type=click.Path(path_type=Path), help="Write the page of `lora-merge report`."
)
@click.option("--dry-run", is_flag=True, help="Say what it would take, from the headers.")
@json_option
def command(
    adapters: tuple[str, ...],
    cluster: str | None,
    algorithm: Literal["agglomerative", "spectral"],
    per_module: bool,
    count: int | None,
    width: int | None,
    svg: Path | None,
    png: Path | None,
    html: Path | None,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Compare all pairs of ADAPTERs on their deltas, without forming them.

    Ends in advice: which can be averaged, which conflict, and in which modules.
    """
    groups, chosen = _groups(cluster), bool(given["modules"])
    import lora_merge
    from lora_merge.cli.shared.api import show_notes_of, shown_progress
    from lora_merge.cli.shared.output import LongList, Output
    from lora_merge.cli.views.compare import comparison_view, plan_lines
    from lora_merge.files.pages.html_page import check_page
    from lora_merge.files.pages.pictures import check_pictures

    if count is not None:
        _no_pictures(cluster=cluster, svg=svg, png=png, html=html, per_module=per_module)
    output = Output(as_json, width=width)
    check_pictures(svg, png)
    check_page(html)
    opening = {name: given.pop(name) for name in names_of(BaseOptions)}
    opened = lora_merge.open_adapters(adapters, **opening)
    if count is not None:
        shared = {name: given[name] for name in ("modules", "accept_base_models")}
        _neighbours(output, opened, count, shared, dry_run)
        return
    if dry_run:
        plan = lora_merge.plan_compare(opened, **given, angles=chosen, per_module=bool(html))
        output.data(plan.to_dict(), *plan_lines(plan))
        return
    show_notes_of(output, opened)
    _spare_memory(len(opened))
    single: list[PairMatrices] = []  # the modules whose angles a terminal shows
    every = None
    if as_json and (per_module or chosen):
        every = click.get_current_context().with_resource(LongList())

    def take(matrices: "PairMatrices") -> None:
        if every is not None:
            every.append(matrices.to_dict())
        elif chosen and len(single) < MOST_MODULES:
            single.append(matrices)

    with shown_progress(output) as progress:
        comparison = lora_merge.compare(
            opened,
            **given,
            angles=chosen,
            per_module=bool(html),
            on_matrices=take if every is not None or chosen else None,
            progress=progress,
        )
        if html:
            shared = {name: value for name, value in given.items() if name != "seed"}
            lora_merge.report(opened, html, **shared, comparison=comparison, progress=progress)
    for picture in filter(None, (svg, png)):
        lora_merge.draw(comparison, picture)
    verdict = lora_merge.judge(comparison)
    document, lines = {}, []
    if cluster is not None:
        found = lora_merge.group(comparison, groups, algorithm=algorithm)
        document["clusters"] = found
        lines = _cluster_lines(found, comparison.adapters)
    if as_json:
        document = {**comparison.to_dict(), **verdict.to_dict(), **document}
        document.pop("modules", None)
        output.data(document, lists={"modules": every} if every else {})
        return
    view = comparison_view(comparison, verdict, single, width=output.width, plain=output.plain)
    output.data(document, view, *lines)


def _no_pictures(**given: object) -> None:
    for name, value in given.items():
        if value:
            flag = "--" + name.replace("_", "-")
            raise click.UsageError(f"--neighbours has no table of all pairs: leave out {flag}")


def _neighbours(
    output: "Output", opened: "list[Adapter]", count: int, shared: dict[str, Any], dry_run: bool
) -> None:
    """The nearest of each, where pairs are too many to show."""
    import lora_merge
    from lora_merge.cli.shared.api import show_notes_of, shown_progress
    from lora_merge.cli.views.compare import plan_lines
    from lora_merge.cli.views.pairs.neighbours import neighbours_view

    if dry_run:
        plan = lora_merge.plan_neighbours(opened, count, **shared)
        output.data(plan.to_dict(), *plan_lines(plan))
        return
    show_notes_of(output, opened)
    _spare_memory(len(opened))
    with shown_progress(output) as progress:
        found = lora_merge.neighbours(opened, count, **shared, progress=progress)
    output.data(found.to_dict(), neighbours_view(found, width=output.width, plain=output.plain))


def _spare_memory(count: int) -> None:
    """Give tables of many adapters back to the system, which otherwise stay on heaps."""
    from lora_merge.cli.shared.malloc import return_large_blocks

    if count > MANY:
        return_large_blocks(1 << 30, block=1 << 18)


def _groups(text: str | None) -> int | None:
    if text is None or text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise click.UsageError(f"--cluster takes a number or auto, not {text!r}")
    return int(text)


def _cluster_lines(found: list[int], adapters: tuple[str, ...]) -> list[str]:
    lines = [f"\n{len(set(found))} group{'s' if len(set(found)) > 1 else ''}"]
    for group in sorted(set(found)):
        members = [a for a, g in zip(adapters, found, strict=True) if g == group]
        lines.append(f"  {group + 1}: {' '.join(members)}")
    return lines
