"""`lora-merge usage`: which expert speaks where."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_merge.cli.shared.options import json_option
from lora_merge.cli.shared.texts import batch_options, load_texts, text_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_merge.mixture.insight.usage import Usage


@click.command(
    epilog="""\b
Examples:
  lora-merge usage mix --base ./llama --data texts.jsonl
  lora-merge usage mix --base ./llama --data a.jsonl --by module --plot a.png
""",
    short_help="Show which expert speaks where, on your text.",
)
@text_options
@click.option(
    "--by", type=click.Choice(["layer", "kind", "module"]), default="layer", show_default=True
)
@batch_options
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it: a .png, .svg or .pdf.")
@json_option
def command(
    mixture: Path,
    base: str,
    data: Path,
    by: str,
    max_length: int,
    batch_size: int,
    device: str,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Run MIXTURE over the texts in DATA and show each expert's mean weight, place by place.

    If the rows name their expert, the texts of each are shown apart as well.
    """
    from lora_merge.adapters.module_names import kind_of, layer_of
    from lora_merge.cli.shared.output import Output
    from lora_merge.mixture.insight.picture import check_picture, draw_usage
    from lora_merge.mixture.runtime.attach import load_mixture
    from lora_merge.mixture.training.base_model import watch_rows

    output = Output(as_json)
    if plot is not None:
        check_picture(plot)
    opened, model, rows = load_texts(
        output, mixture, base=base, data=data, max_length=max_length, device=device
    )
    handle = load_mixture(model, opened)

    everything = watch_rows(model, handle, rows.examples, batch_size)
    labels = sorted({e.expert for e in rows.examples if e.expert >= 0})
    apart = {
        opened.names[label]: watch_rows(
            model, handle, [e for e in rows.examples if e.expert == label], batch_size
        )
        for label in labels
    }
    keys: dict[str, Callable[[str], str]] = {"layer": layer_of, "kind": kind_of, "module": str}
    key = keys[by]
    if plot is not None:
        draw_usage(everything, plot, key)
    result = {
        "schema": 1,
        "rows": len(rows.examples),
        "left_out": list(rows.faults),
        **everything.to_dict(),
        "by_label": {
            name: usage.by(lambda _: "all")["all"].tolist() for name, usage in apart.items()
        },
    }
    output.data(result, *_view(everything, apart, key))


def _view(usage: "Usage", apart: dict[str, "Usage"], key: Any) -> "list[RenderableType]":
    from lora_merge.adapters.module_names import natural

    weights = usage.by(key)
    entropies: dict[str, list[float]] = {}
    for name in usage.modules:
        entropies.setdefault(key(name), []).append(usage.entropy(name))
    mean = {name: sum(values) / len(values) for name, values in entropies.items()}
    places = {name: weights[name].tolist() for name in natural(weights)}
    shown: list[RenderableType] = ["mean weight of each expert", _heat(usage, places, mean)]
    if apart:
        texts = {f"text of {n}": u.by(lambda _: "all")["all"].tolist() for n, u in apart.items()}
        shown += ["by the row's expert", _heat(usage, texts, {})]
    return shown


def _heat(usage: "Usage", rows: dict[str, list[float]], entropy: dict[str, float]) -> Any:
    """A table whose cells are as bright as their numbers."""
    from rich.text import Text

    from lora_merge.cli.shared.output import table

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
