"""`lora-merge spectra`: singular values of every module, and what rank to keep."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_merge.adapters.access.opening import BaseOptions
from lora_merge.analysis.metrics import METRICS, Metric
from lora_merge.api.arguments.looking import BesideBase, Draw, ModuleOptions
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import Choice, adapters_argument, json_option, width_option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_merge.adapters.measured.spectra import AdapterSpectra


@click.command(
    epilog="""\b
Examples:
  lora-merge spectra ADAPTER
  lora-merge spectra ADAPTER --module '3.*.q_proj'
  lora-merge spectra ADAPTER --sort stable --top 10
  lora-merge spectra 'runs/*' --json > spectra.json
""",
)
@adapters_argument
@options_of(
    ModuleOptions, about={"modules": "only modules that match; a single one is shown in full"}
)
@options_of(Draw, only=("metric",), about={"metric": "what the heat map shows"})
@click.option(
    "--sort", type=Choice(["name", *METRICS]), help="List modules one by one, in this order."
)
@click.option("--top", type=click.IntRange(min=1), help="List only so many modules, or values.")
@options_of(
    BesideBase, only=("intruders",), about={"intruders": "with --base: count intruder dimensions"}
)
@width_option
@click.option("--csv", type=click.Path(path_type=Path), help="Write module, i, s_i, energy to i.")
@click.option("--svg", type=click.Path(path_type=Path), help="Draw heat map and curves.")
@click.option("--png", type=click.Path(path_type=Path), help="The same as pixels.")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Write the page of `lora-merge report`, without pairs.",
)
@options_of(
    BaseOptions,
    about={"base": "base model's directory: relative norms, amplification, and a check of names"},
)
@json_option
def command(
    adapters: tuple[str, ...],
    modules: tuple[str, ...],
    metric: Metric,
    sort: str | None,
    top: int | None,
    intruders: bool,
    width: int | None,
    csv: Path | None,
    svg: Path | None,
    png: Path | None,
    html: Path | None,
    as_json: bool,
    **opening: Any,
) -> None:
    """Show the singular spectra of each ADAPTER's deltas, and what rank is worth keeping.

    Values are those of scaling * B @ A, exact, computed from the factors.
    """
    base: Path | None = opening["base"]
    if intruders and base is None:
        raise click.UsageError("--intruders needs --base")
    import lora_merge
    from lora_merge.analysis.export import CSV_MARK, spectra_document
    from lora_merge.cli.shared.api import show_notes_of, shown_progress
    from lora_merge.cli.shared.output import Output
    from lora_merge.files.pages.html_page import check_page
    from lora_merge.files.pages.pictures import check_pictures
    from lora_merge.files.targets import check_file

    output = Output(as_json, width=width)
    if csv:
        check_file(csv, CSV_MARK)
    check_pictures(svg, png)
    check_page(html)
    opened = lora_merge.open_adapters(adapters, **opening)
    show_notes_of(output, opened)
    with shown_progress(output) as progress:
        results = [
            lora_merge.spectra(one, modules=modules, keep_cores=base is not None, progress=progress)
            for one in opened
        ]
        reports = [
            lora_merge.spectra_beside_base(
                one, base, intruders=intruders, spectra=found, progress=progress
            )
            for one, found in zip(opened, results, strict=True)
            if base is not None
        ]
    if csv:
        lora_merge.write_csv(results, csv)
    for picture in filter(None, (svg, png)):
        lora_merge.draw(results, picture, metric=metric)
    if html:
        lora_merge.report(opened, html, spectra=results, pairs=False)
    if as_json:
        document = spectra_document(results)
        for entry, report in zip(document["adapters"], reports, strict=False):
            entry["base"] = report.to_dict()
        output.data(document)
        return
    from lora_merge.cli.views.beside_base import base_view

    views = _views(results, bool(modules), metric, sort, top, output.width, output.plain)
    for spectra, report in zip(results, reports, strict=False):
        views.append(base_view(report, spectra.adapter, plain=output.plain))
    output.data({}, *views)


def _views(
    results: "list[AdapterSpectra]",
    chosen: bool,
    metric: str,
    sort: str | None,
    top: int | None,
    width: int,
    plain: bool,
) -> "list[RenderableType]":
    from rich.text import Text

    from lora_merge.cli.views import spectra as view
    from lora_merge.cli.views.module import module_view

    if sort or top or chosen:
        views: list[RenderableType] = []
        for spectra in results:
            if len(results) > 1:
                views.append(Text(spectra.adapter, style="bold"))
            if chosen and len(spectra.modules) == 1:
                views.append(module_view(spectra.modules[0], width=width, top=top, plain=plain))
            else:
                views.append(
                    view.module_list(
                        spectra.modules, sort=sort or "frobenius", top=top, width=width, plain=plain
                    )
                )
        return views
    if len(results) == 1:
        return [view.overview(results[0], width=width, metric=metric, plain=plain)]
    return [view.several(results, width=width, metric=metric, plain=plain)]
