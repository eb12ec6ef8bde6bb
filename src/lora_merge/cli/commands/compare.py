"""`lora-merge compare`: which adapters agree, which conflict, and where."""

from pathlib import Path
from typing import Any, Literal

import click

from lora_merge.adapters.access.opening import BaseOptions
from lora_merge.api.arguments.looking import Compare
from lora_merge.cli.shared.fields import names_of, options_of
from lora_merge.cli.shared.options import adapters_argument, json_option, width_option


@click.command(
    epilog="""\b
Examples:
  lora-merge compare math code chat
  lora-merge compare math code --module '*.5.*'
  lora-merge compare 'runs/*' --cluster auto
  lora-merge compare 'runs/*' --html runs.html --svg runs.svg
  lora-merge compare 'runs/*' --cluster 4 --algorithm spectral --json
""",
)
@adapters_argument
@click.option("--cluster", metavar="K|auto", help="Group the adapters before merging.")
@click.option(
    "--algorithm",
    type=click.Choice(["agglomerative", "spectral"]),
    default="agglomerative",
    show_default=True,
    help="How to group them.",
)
@options_of(Compare, about={"modules": "only these modules, with all principal angles; repeatable"})
@click.option("--per-module", is_flag=True, help="Every module's matrices in --json.")
@width_option
@click.option("--svg", type=click.Path(path_type=Path), help="Draw cosines, interference and tree.")
@click.option("--png", type=click.Path(path_type=Path), help="The same as pixels.")
@click.option(
    "--html", type=click.Path(path_type=Path), help="Write the page of `lora-merge report`."
)
@json_option
def command(
    adapters: tuple[str, ...],
    cluster: str | None,
    algorithm: Literal["agglomerative", "spectral"],
    per_module: bool,
    width: int | None,
    svg: Path | None,
    png: Path | None,
    html: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Compare all pairs of ADAPTERs on their deltas, without forming them.

    Ends in advice: which can be averaged, which conflict, and in which modules.
    """
    groups, chosen = _groups(cluster), bool(given["modules"])
    import lora_merge
    from lora_merge.cli.shared.api import show_notes_of, shown_progress
    from lora_merge.cli.shared.output import Output
    from lora_merge.cli.views.compare import comparison_view
    from lora_merge.files.pages.pictures import check_pictures, write_pictures
    from lora_merge.files.targets import MARK, check_file

    output = Output(as_json, width=width)
    check_pictures(svg, png)
    if html:
        check_file(html, MARK.encode())
    opening = {name: given.pop(name) for name in names_of(BaseOptions)}
    opened = lora_merge.open_adapters(adapters, **opening)
    show_notes_of(output, opened)
    with shown_progress(output) as progress:
        comparison = lora_merge.compare(opened, **given, angles=chosen, progress=progress)
        if html:
            shared = {name: value for name, value in given.items() if name != "seed"}
            lora_merge.report(opened, html, **shared, comparison=comparison, progress=progress)
    if svg or png:
        from lora_merge.analysis.comparison_figure import draw_comparison

        write_pictures(lambda: draw_comparison(comparison), svg=svg, png=png)
    verdict = lora_merge.judge(comparison)
    document = {**comparison.to_dict(per_module=per_module or chosen), **verdict.to_dict()}
    lines = []
    if cluster is not None:
        found = lora_merge.group(comparison, groups, algorithm=algorithm)
        document["clusters"] = found
        lines = _cluster_lines(found, comparison.adapters)
    if as_json:
        output.data(document)
        return
    view = comparison_view(comparison, verdict, width=output.width, plain=output.plain)
    output.data(document, view, *lines)


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
