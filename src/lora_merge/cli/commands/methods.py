"""`lora-merge methods`: the table of methods."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from lora_merge.cli.shared.method_names import complete_method
from lora_merge.cli.shared.options import json_option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_merge.merge.methods.method import Method

# What adapters are → what `auto` merges them by (`merge.auto.method.choose`).
AUTO = {
    "one adapter": "svd",
    "all share A, or all share B": "fedavg",
    "mean cosine of their deltas above 0.5": "mean",
    "all others": "wudi-iso",
}


@click.command
@click.argument("name", required=False, shell_complete=complete_method)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """Show all merge methods, or everything about the one of a NAME."""
    from lora_merge.cli.shared.output import Output
    from lora_merge.merge.methods.registry import find_method, methods

    output = Output(as_json)
    if name is None:
        table = list(methods().values())
        output.data({"schema": 1, "methods": [_data(m) for m in table]}, *_overview(table))
    elif name == "auto":
        rules = [{"adapters": adapters, "method": method} for adapters, method in AUTO.items()]
        lines = [f"  {adapters:<52} {method}" for adapters, method in AUTO.items()]
        output.data(
            {"schema": 1, "name": "auto", "rules": rules},
            "auto chooses a method from the adapters and says why; the recipe names it.",
            "It looks at up to eight modules; the first line that holds decides:\n",
            *lines,
            "\n--scale auto then chooses how much of it to apply, whatever the method.",
        )
    else:
        method = find_method(name)
        output.data({"schema": 1, **_data(method)}, *_details(method))


def _data(method: "Method") -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "name": method.name,
        "aliases": list(method.aliases),
        "summary": method.summary,
        "paper": method.paper,
        "space": method.space,
        "spaces": list(method.spaces or (method.space,)),
        "rank": method.rank,
        "normalize": method.normalize,
        "gauge_free": method.gauge_free,
        "adapters": list(method.adapters),
        "ordered": method.ordered,
        "needs": method.needs,
        "cost": method.cost,
        "per_adapter": list(method.per_adapter),
        "parameters": [asdict(parameter) for parameter in method.parameters()],
    }


def _overview(table: "Sequence[Method]") -> "list[RenderableType]":
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column("method", no_wrap=True)
    grid.add_column("space", no_wrap=True)
    grid.add_column("what it does")
    for method in table:
        grid.add_row(method.name, method.space, method.summary)
    return [grid, "lora-merge methods NAME shows its parameters, cost and source"]


def _details(method: "Method") -> "list[RenderableType]":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    low, high = method.adapters
    count = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
    ranks = {"largest": "the largest input rank", "full": "all units", "units": "as small as exact"}
    facts = {
        "source": method.paper,
        "aliases": ", ".join(method.aliases),
        "space": ", ".join(method.spaces or (method.space,)),
        "adapters": count,
        "rank": f"{ranks.get(method.rank, method.rank)} unless --rank says otherwise"
        + ("; made by the method itself" if method.makes_rank else "; by truncated SVD"),
        "weights": {"none": "as given", "sum": "divided by their sum"}.get(
            method.normalize, method.normalize
        ),
        "depends on": (
            "the deltas alone" if method.gauge_free else "how each delta is factored into B A"
        )
        + ("; goes from the first to the second" if method.ordered else ""),
        "needs": method.needs or "the adapters alone",
        "cost": f"{method.cost} per module",
        "by adapter": ", ".join(method.per_adapter),
    }
    head = Text.assemble((method.name, "bold"), f"  {method.summary}\n")
    known = Table.grid(padding=(0, 1, 0, 0))  # a long value goes on below itself
    for key, value in facts.items():
        if value:
            known.add_row(f"{key:<11}", Text(value))
    parameters = method.parameters()
    if not parameters:
        return [head, known, "no parameters"]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("parameter", "default", "values", "what it does"):
        grid.add_column(column, no_wrap=column in ("parameter", "default"))
    for p in parameters:
        values = f"{p.kind}{', ' if p.limits else ''}{p.limits}"
        grid.add_row(p.name, _plain(p.default), Text(values), Text(p.about))
    return [head, known, grid]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
