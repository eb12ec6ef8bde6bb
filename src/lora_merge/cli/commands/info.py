"""`lora-merge info`: what an adapter is."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lora_merge.cli.shared.options import json_option, open_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_merge.analysis.info import AdapterInfo, ModuleInfo


@click.command(short_help="What an adapter is: modules, ranks, norms, oddities.")
@click.argument("adapter")
@open_options
@json_option
def command(
    adapter: str,
    alpha: float | None,
    rslora: bool,
    rename: tuple[str, ...],
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Show what an ADAPTER is: base model, modules, ranks, norms, and what is odd about it."""
    from lora_merge.analysis.info import describe
    from lora_merge.cli.shared.open import open_single
    from lora_merge.cli.shared.output import Output

    output = Output(as_json)
    opened = open_single(
        adapter, alpha=alpha, rslora=rslora, allow_pickle=allow_pickle, rename=rename
    )
    with output.progress("reading", len(opened.modules)) as advance:
        info = describe(opened, on_module=advance)
    output.data(info.to_dict(), *_view(info))


def _view(info: "AdapterInfo") -> "list[RenderableType]":
    from rich.text import Text

    from lora_merge.adapters.module_names import place_of
    from lora_merge.cli.shared.output import size, span, table

    lines = [
        f"[bold]{_safe(info.name)}[/bold]",
        f"base model  {_safe(info.base_model or 'not said')}",
        f"size        {info.num_parameters:,} parameters, {size(info.num_bytes)}, "
        f"{len(info.modules)} modules",
        f"norm        {info.norm:.4g} (Frobenius, all deltas together)",
    ]
    if info.revision:
        lines.insert(1, f"revision    {info.revision}")
    kinds: dict[str, list[ModuleInfo]] = {}
    for module in info.modules:
        kinds.setdefault(place_of(module.name).part, []).append(module)
    grid = table("kind", "modules", "shape", "rank", "scaling", "norm: mean", "max")
    for kind, modules in kinds.items():
        ranks = [m.rank for m in modules]
        norms = [m.norm for m in modules]
        grid.add_row(
            _safe(kind),
            str(len(modules)),
            _common([f"{m.shape[0]} x {m.shape[1]}" for m in modules]),
            span(min(ranks), max(ranks)),
            _common([f"{m.scaling:g}" for m in modules]),
            f"{sum(norms) / len(norms):.4g}",
            f"{max(norms):.4g}",
        )
    remarks = [Text(f"- {oddity}") for oddity in info.oddities]
    return ["\n".join(lines), grid, *remarks]


def _common(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else f"{len(set(values))} kinds"


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(text)
