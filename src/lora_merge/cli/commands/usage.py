"""`lora-merge usage`: which expert speaks where."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_merge.api.arguments.texts import Usage
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import Choice, json_option
from lora_merge.cli.shared.texts import Rows, mixture_argument

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_merge.mixture.insight.usage import Usage as Seen


@click.command(
    epilog="""\b
Examples:
  lora-merge usage mix --base ./llama --data texts.jsonl
  lora-merge usage mix --base ./llama --data a.jsonl --by module --plot a.png
""",
)
@mixture_argument
@options_of(Usage)
@click.option("--by", type=Choice(["layer", "kind", "module"]), default="layer", show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it: a .png, .svg or .pdf.")
@click.option("--html", type=click.Path(path_type=Path), help="Write all of it as a page.")
@json_option
def command(
    mixture: Path, by: str, plot: Path | None, html: Path | None, as_json: bool, **given: Any
) -> None:
    """Run MIXTURE over the texts in DATA and show each expert's mean weight, place by place.

    If the rows name their expert, the texts of each are shown apart as well.
    """
    import lora_merge
    from lora_merge.adapters.module_names import kind_of, layer_of
    from lora_merge.cli.shared.output import Output
    from lora_merge.files.pages.html_page import check_page, write_html
    from lora_merge.mixture.insight.picture import check_picture, draw_usage
    from lora_merge.mixture.insight.usage_page import usage_page

    output = Output(as_json)
    if plot is not None:
        check_picture(plot)
    check_page(html)
    rows = Rows(output)
    seen = lora_merge.usage(mixture, **given, by_label=True, on_data=rows)
    keys: dict[str, Callable[[str], str]] = {"layer": layer_of, "kind": kind_of, "module": str}
    key = keys[by]
    if plot is not None:
        draw_usage(seen, plot, key)
    if html is not None:
        write_html(usage_page(seen), html)
    result = {
        "schema": 1,
        **({} if plot is None else {"plot": str(plot)}),
        "rows": rows.count,
        "left_out": rows.faults,
        **seen.to_dict(),
        "by_label": {
            name: usage.by(lambda _: "all")["all"].tolist() for name, usage in seen.labels.items()
        },
    }
    wrote = [] if plot is None else [f"wrote {plot}"]
    output.data(result, *_view(seen, key), *wrote)


def _view(usage: "Seen", key: Any) -> "list[RenderableType]":
    from lora_merge.adapters.module_names import natural

    apart = usage.labels
    weights = usage.by(key)
    places = {name: weights[name].tolist() for name in natural(weights)}
    heat = _heat(usage, places, usage.entropies(key))
    shown: list[RenderableType] = ["mean weight of each expert", heat]
    if apart:
        texts = {f"text of {n}": u.by(lambda _: "all")["all"].tolist() for n, u in apart.items()}
        shown += ["by the row's expert", _heat(usage, texts, {})]
    return shown


def _heat(usage: "Seen", rows: dict[str, list[float]], entropy: dict[str, float]) -> Any:
    """A table whose cells are as bright as their numbers."""
    from rich.text import Text

    from lora_merge.cli.shared.table import table

    grid = table("", *usage.experts, *(["entropy"] if entropy else []))
    most = max((abs(v) for row in rows.values() for v in row), default=1.0) or 1.0
    for name, values in rows.items():
        cells = []
        for value in values:
            level = int(200 * abs(value) / most)
            ink = "black" if level > 110 else "white"
            paper = f"rgb({level // 3},{level},{level})"
            cells.append(Text(f" {value:.3f} ", style=f"{ink} on {paper}"))
        grid.add_row(name, *cells, *([f"{entropy[name]:.2f}"] if entropy else []))
    return grid
