"""`lora-merge info`: one adapter on the terminal."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from lora_merge.adapters.module_names import place_of
from lora_merge.analysis.info import AdapterInfo, ModuleInfo
from lora_merge.cli.shared.output import size, span, table


def info_view(info: AdapterInfo) -> list[RenderableType]:
    """The facts, a table of the kinds of modules, and what is odd."""
    lines = [
        f"[bold]{_safe(info.name)}[/bold]",
        f"format      {info.dialect}",
        f"base model  {_safe(info.base_model or 'not said')}",
        f"alpha       {info.alpha:g}{' (rsLoRA)' if info.rslora else ''}",
        f"size        {info.num_parameters:,} parameters, {size(info.num_bytes)} "
        f"({', '.join(sorted({m.dtype for m in info.modules}))}), "
        f"{len(info.modules)} modules",
        f"norm        {info.norm:.4g} (Frobenius, all deltas together)",
    ]
    if info.revision:
        lines.insert(1, f"revision    {info.revision}")
    kinds: dict[str, list[ModuleInfo]] = {}
    for module in info.modules:
        kinds.setdefault(place_of(module.name).part, []).append(module)
    grid = table("kind", "modules", "shape", "rank", "scaling", "delta", "norm: mean", "max")
    for kind, modules in kinds.items():
        ranks = [m.rank for m in modules]
        norms = [m.norm for m in modules]
        grid.add_row(
            _safe(kind),
            str(len(modules)),
            _common([f"{m.shape[0]} x {m.shape[1]}" for m in modules]),
            span(min(ranks), max(ranks)),
            _common([f"{m.scaling:g}" for m in modules]),
            _common([m.verdict for m in modules]),
            f"{sum(norms) / len(norms):.4g}",
            f"{max(norms):.4g}",
        )
    remarks = [Text(f"- {oddity}") for oddity in info.oddities]
    return ["\n".join(lines), grid, *remarks]


def _common(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else f"{len(set(values))} kinds"


def _safe(text: str) -> str:
    return escape(text)
