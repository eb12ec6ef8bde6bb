"""`lora-merge info`: one adapter, or a mixture, on the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from lora_merge.adapters.module_names import place_of
from lora_merge.analysis.info import AdapterInfo, ModuleInfo
from lora_merge.cli.shared.output import size
from lora_merge.cli.shared.table import table
from lora_merge.cli.views.format import dashed

if TYPE_CHECKING:
    from lora_merge.mixture.mixture import Mixture


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
            dashed(ranks),
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


def mixture_data(mixture: "Mixture", out: Path | None) -> dict[str, Any]:
    """A mixture as JSON."""
    from lora_merge.mixture.runtime.overhead import overhead

    return {
        "schema": 1,
        "out": None if out is None else str(out),
        "base_model": mixture.alignment.base_model,
        "gate": mixture.spec.to_json(),
        "experts": [
            {
                "name": e.name,
                "general": e.general,
                "source": e.source,
                "ranks": sorted(e.adapter.ranks()),
                "modules": len(e.adapter.modules),
                "parameters": e.adapter.num_parameters,
            }
            for e in mixture.experts
        ],
        "overhead": overhead(mixture).to_dict(),
    }


def mixture_view(mixture: "Mixture") -> list[RenderableType]:
    """A mixture for a person."""
    from lora_merge.mixture.runtime.overhead import overhead

    grid = table("expert", "rank", "modules", "parameters")
    for expert in mixture.experts:
        ranks = expert.adapter.ranks()
        grid.add_row(
            expert.name + (" (subtracted)" if expert.general else ""),
            dashed(ranks),
            str(len(expert.adapter.modules)),
            f"{expert.adapter.num_parameters:,}",
        )
    cost = overhead(mixture)
    spec = mixture.spec
    kept = f", top {spec.top_k}" if spec.top_k else ""
    lines = (
        f"gate       {spec.preset}: {spec.signal}, per {spec.granularity}, {spec.value}{kept}"
        f"{', can abstain' if spec.null_expert else ''}",
        f"cost       R up to {cost.max_units} on {cost.modules} modules, {size(cost.bytes)} in "
        f"float32, {cost.percent:.1f} % of their work",
    )
    twice = ("           and a second pass of the base",) if cost.passes > 1 else ()
    return [grid, *lines, *twice]


def mixture_info(mixture: "Mixture", name: str) -> list[RenderableType]:
    """What a mixture directory holds."""
    spec, known = mixture.spec, mixture.descriptors
    facts = [f"base       {mixture.alignment.base_model or 'not said'}"]
    if not spec.trained:
        facts.append("           the gate is untrained: lora-merge train")
    if known is not None:
        facts.append(f"described  {', '.join(known.experts)} at {len(known.modules)} modules")
    title = f"{name}: a mixture of {mixture.num_experts} experts"
    notes = [f"note: {note}" for note in mixture.notes]
    return [_safe(title), *mixture_view(mixture), *map(_safe, (*facts, *notes))]
