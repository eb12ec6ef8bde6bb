"""A rank plan and a resize report for a terminal."""

from collections.abc import Mapping, Sequence
from math import sqrt

from rich.console import Group, RenderableType
from rich.text import Text

from lora_merge.adapters.module_names import labels, place_of
from lora_merge.adapters.writer import OutputPlan
from lora_merge.cli.shared.output import size
from lora_merge.cli.views.format import dashed, shorten
from lora_merge.cli.views.glyphs import RAMP
from lora_merge.cli.views.grid import grid, room_for
from lora_merge.ranks.choose import ModuleRank, RankPlan
from lora_merge.reshape.resize import ResizeReport

_BAR = 10  # columns of a bar
# vLLM allocates its LoRA slots at one of these.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def plan_view(plan: RankPlan, *, width: int, plain: bool, each: bool) -> RenderableType:
    """The difference a plan makes: by kind of module, then every module's rank by layer."""
    names = labels(place_of(name) for name in plan.modules)
    kinds: dict[str, list[ModuleRank]] = {}
    for name, module in plan.modules.items():
        place = place_of(name)
        kinds.setdefault(names[place.stack, place.kind], []).append(module)
    heads = ["count", "rank", "energy", "error", "parameters", "kept".ljust(_BAR)]
    cells = [_cells(modules, plain) for modules in kinds.values()]
    cells.append(_cells(list(plan.modules.values()), plain))
    label = max(11, room_for(heads, cells, width, gap=2))
    names_of_rows = [*(shorten(kind, label) for kind in kinds), "all modules"]
    rows = [[name, *row] for name, row in zip(names_of_rows, cells, strict=True)]
    parts: list[RenderableType] = [
        grid(["module", *heads], rows, left=(0, 6), gap=2, ruled=[len(kinds)], plain=plain),
        Text(""),
        rank_map(plan, width),
    ]
    if each:
        parts.append(_list(plan.modules, width, plain))
    parts += _certificate(plan)
    return Group(*parts)


def output_view(output: OutputPlan) -> RenderableType:
    """What the file will be, and what loaders need to know about it."""
    largest = int(output.config["r"])
    slots = next((r for r in _VLLM_RANKS if r >= largest), None)
    lines = [f"{size(output.num_bytes)} ({output.dtype}), largest rank {largest}"]
    if slots:
        lines[0] += f"; vLLM needs --max-lora-rank {slots}"
    if output.config["rank_pattern"]:
        lines.append(
            "ranks differ, so adapter_config.json has a rank_pattern: PEFT, diffusers and SGLang "
            "read it; --uniform pads to one rank for llama.cpp"
        )
    return Text("\n".join(lines))


def report_view(report: ResizeReport) -> RenderableType:
    """What was written and how far it is from the original."""
    plan = report.plan
    total = sqrt(report.truncation**2 + report.cast**2)
    text = Text()
    text.append(f"rank {dashed(_ranks(plan))}, ", style="bold")
    text.append(f"{100 * plan.energy:.2f} % of the energy in ", style="bold")
    text.append(f"{_share(plan)} of the parameters\n", style="bold")
    text.append(
        f"relative error {_percent(total)} = truncation {_percent(report.truncation)}, "
        f"rounding to {report.dtype} {_percent(report.cast)}\n"
    )
    return Group(text, output_view(report.output), Text(f"wrote {report.out}"))


def rank_map(plan: RankPlan, width: int) -> RenderableType:
    """Every module's new rank, layers across; coloured by the share of its rank that is kept."""
    places = {name: place_of(name) for name in plan.modules}
    names = labels(places.values())
    layers = sorted({p.layer for p in places.values() if p.layer is not None})
    if len(layers) < 2:
        return Text("")
    cells = {
        (names[p.stack, p.kind], p.layer): plan.modules[name]
        for name, p in places.items()
        if p.layer is not None
    }
    rows = list(dict.fromkeys(name for name, _ in cells))
    label = min(max(map(len, rows)), max(14, width // 3))
    digits = max(2, len(str(max(m.rank for m in cells.values())))) + 1
    per = max(1, (width - label - 1) // digits)
    text = Text("new rank by layer\n", style="bold")
    for start in range(0, len(layers), per):
        block = layers[start : start + per]
        ruler = "".join(f"{layer:>{digits}}" for layer in block)
        text.append(f"{'':<{label}} {ruler}\n", style="not bold dim")
        for name in rows:
            text.append(f"{shorten(name, label):<{label}} ", style="not bold")
            for layer in block:
                module = cells.get((name, layer))
                if module is None:
                    text.append(f"{'.':>{digits}}", style="not bold dim")
                    continue
                step = min(9, round(9 * module.rank / module.before))
                colour = "white" if step < 5 else "black"
                text.append(f"{module.rank:>{digits}}", style=f"not bold {colour} on {RAMP[step]}")
            text.append("\n")
    return text


def _cells(modules: Sequence[ModuleRank], plain: bool) -> list[str]:
    before = sum(m.before * m.cost for m in modules)
    after = sum(m.rank * m.cost for m in modules)
    total = sum(m.frobenius**2 for m in modules)
    lost = sum((1 - m.energy) * m.frobenius**2 for m in modules)
    share = lost / total if total else 0.0
    arrow = "->" if plain else "→"
    old = dashed([m.before for m in modules])
    new = dashed([m.rank for m in modules])
    filled = round(_BAR * after / before)
    blocks = ("#" if plain else "█") * filled + ("." if plain else "░") * (_BAR - filled)
    return [
        str(len(modules)),
        f"{old} {arrow} {new}",
        f"{100 * (1 - share):.1f} %",
        _percent(sqrt(max(share, 0.0))),
        f"{after - before:+,}",
        blocks,
    ]


def _list(modules: Mapping[str, ModuleRank], width: int, plain: bool) -> RenderableType:
    arrow = "->" if plain else "→"
    rows = [
        [
            shorten(name, max(20, width - 36)),
            f"{m.before} {arrow} {m.rank}",
            f"{100 * m.energy:.1f} %",
            f"{(m.rank - m.before) * m.cost:+,}",
        ]
        for name, m in modules.items()
    ]
    return Group(grid(["module", "rank", "energy", "parameters"], rows, gap=2, plain=plain), "")


def _certificate(plan: RankPlan) -> list[RenderableType]:
    lines = [
        f"rule {plan.rule}: {100 * plan.energy:.2f} % of the energy in {_share(plan)} "
        f"of the parameters ({plan.parameters_before:,} to {plan.parameters:,})"
    ]
    if plan.threshold is not None:
        lines.append(f"one cut for all modules: s_i >= {plan.threshold:.4g} s_1")
    found = plan.certificate
    if found and plan.rule.kind == "match":
        saved = found.budget - found.used
        lines.append(
            f"{found.method}: no fewer parameters reach the error of rank {plan.rule.value:g} "
            f"everywhere, which takes {found.budget:,} ({saved:,} more)"
        )
    elif found:
        gap = found.gap / found.loss if found.loss else 0.0
        exact = "optimal" if gap < 1e-12 else f"at most {_percent(gap)} above the optimum"
        unused = found.budget - found.used
        lines.append(f"{found.method}: objective {exact}; {unused:,} parameters of the budget free")
    return [Text("\n".join(lines))]


def _ranks(plan: RankPlan) -> tuple[int, int]:
    return min(plan.ranks.values()), max(plan.ranks.values())


def _share(plan: RankPlan) -> str:
    return f"{100 * plan.parameters / plan.parameters_before:.0f} %"


def _percent(value: float) -> str:
    """A small ratio: two significant digits."""
    if value == 0:
        return "0 %"
    if value < 1e-5:
        return f"{value:.1e}"
    return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.1f} %"
