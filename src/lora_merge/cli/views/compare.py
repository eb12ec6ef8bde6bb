"""A comparison for a terminal: matrix, pairs, kinds of modules, tree, advice."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from lora_merge.analysis.compare import Comparison
from lora_merge.analysis.pairs.matrices import PairMatrices
from lora_merge.analysis.pairs.plan import ComparisonPlan
from lora_merge.analysis.trajectory import Trajectory
from lora_merge.analysis.verdicts import MEANING, Judgement, Kind, Verdict
from lora_merge.cli.shared.output import size as bytes_text
from lora_merge.cli.views.dendrogram import dendrogram
from lora_merge.cli.views.format import number, shorten
from lora_merge.cli.views.glyphs import RAMP
from lora_merge.cli.views.grid import grid
from lora_merge.cli.views.pairs.angles import angles_view, degrees
from lora_merge.printing import short_names

if TYPE_CHECKING:
    from torch import Tensor

_MOST_PAIRS = 10
_MOST_COLUMNS = 10
_LEGEND = (
    "cos: cosine of the deltas; in, out: overlap of input and output spaces (mean squared cosine "
    "of the principal angles), times what random ones of the size show, and the smallest angle; "
    "interf: singular task interference, times chance; signs: entries of opposite sign (standard "
    "error {error:.1f} %), mass: the same weighted by size; sum: |D1 + D2| / (|D1| + |D2|)"
)


def comparison_view(
    comparison: Comparison,
    verdict: Judgement,
    modules: Sequence[PairMatrices] = (),
    *,
    width: int,
    plain: bool,
) -> RenderableType:
    """Everything on a screen or two; principal angles of the modules that are given."""
    verdicts, tree = verdict.pairs, verdict.tree
    names = short_names(comparison.adapters)
    total = comparison.total
    parts: list[RenderableType] = [_norms(total, names), matrix_view(total.cosine, names, width)]
    shown = verdicts[:_MOST_PAIRS]
    parts.append(_pairs(total, shown, names, width, plain))
    if len(shown) < len(verdicts):
        parts.append(Text(f"{len(shown)} of {len(verdicts)} pairs; --json has all", style="dim"))
    error = 100 * float(total.conflict_error.max())
    parts += [Text(_LEGEND.format(error=error), style="dim"), Text("")]
    if modules:
        pairs = [(v.first, v.second) for v in verdicts]
        hidden = total.modules - len(modules)
        parts.append(angles_view(modules, hidden, pairs, names, width=width, plain=plain))
    if len(comparison.kinds) > 1:
        parts += [_kinds(comparison, width, plain), Text("")]
    if verdict.way:
        parts += [_way(verdict.way, width, plain), Text("")]
    if tree:
        parts.append(dendrogram(tree, names, width, plain=plain))
    parts.append(advice_view(comparison, verdict, names))
    return Group(*parts)


def plan_lines(plan: ComparisonPlan) -> list[str]:
    """What a comparison would take."""
    return [
        f"{plan.adapters} adapters, {plan.pairs} pairs, {plan.modules} modules of up to "
        f"{plan.units} units; reads {bytes_text(plan.reads)}",
        f"about {bytes_text(plan.peak_bytes)} of memory with {plan.jobs} workers",
    ]


def matrix_view(cosine: "Tensor", names: Sequence[str], width: int) -> RenderableType:
    """Cosines in hundredths: numbers where they fit, one digit and sign per cell otherwise."""
    count = len(names)
    label = min(max(map(len, names)), 24)
    if count + label + 4 > width:
        return Text(f"{count} x {count} cosines do not fit here; --json has them\n", style="dim")
    size = 6 if count <= _MOST_COLUMNS else 3
    if 3 * count + label + 4 > width:
        size = 1
    text = Text("cosine of the deltas" + (", in tenths" if size < 6 else "") + "\n", style="bold")
    head = "".join(f"{i + 1:>{size}}" for i in range(count)) if size > 1 else ""
    text.append(f"{'':<{label + 3}} {head}".rstrip() + "\n", style="not bold dim")
    for i, name in enumerate(names):
        text.append(f"{i + 1:>2} {shorten(name, label):<{label}} ", style="not bold")
        for j in range(count):
            value = float(cosine[i, j])
            tenths = round(10 * value)
            cell = f"{round(value, 2) + 0.0:>{size}.2f}" if size == 6 else f"{tenths:>{size}}"
            if size == 1:
                cell = "-" if tenths < 0 else "#" if tenths == 10 else str(tenths)
            step = min(9, round(9 * abs(value)))
            colour = "white" if step < 5 else "black"
            text.append(cell, style=f"not bold {colour} on {RAMP[step]}")
        text.append("\n")
    return text


def advice_view(comparison: Comparison, judged: Judgement, names: Sequence[str]) -> RenderableType:
    """Which pairs can be averaged, which conflict, and where."""
    verdicts, whole = judged.pairs, judged.whole
    parts: list[RenderableType] = []
    kinds: dict[Kind, list[Verdict]] = {}
    for verdict in verdicts:
        kinds.setdefault(verdict.kind, []).append(verdict)
    for kind, members in kinds.items():
        head = "every pair" if len(members) == len(verdicts) > 1 else _several(members, names)
        parts.append(Text.assemble((f"{head}: ", "bold"), MEANING[kind]))
        for verdict in members[:3]:
            if verdict.where:
                where = ", ".join(verdict.where)
                parts.append(_indent(f"{_pair(verdict, names)}: most in {where}"))
    for verdict in verdicts:
        if verdict.shared in ("A", "B"):
            what = f"the same {verdict.shared}: only the other factor was trained apart"
            parts.append(_indent(f"- {_pair(verdict, names)} have {what}"))
    started = [v for v in verdicts if v.shared == "init"]
    if started:
        parts.append(
            _indent(
                f"- {_several(started, names)}: A is alike (same initialisation), so overlap of "
                "input spaces means little"
            )
        )
    who = " ".join(names[i] for i in whole.adapters)
    heads = {"prune": f"leave out {who}, then merge", "reweight": f"reweight ({who})"}
    heads["last"] = "take the last checkpoint"
    what = heads.get(whole.action, whole.action)
    text = Text.assemble((f"all together: {what}", "bold"), f": {whole.reason}")
    parts += [text, _indent(whole.command)]
    total, count = comparison.total, len(names)
    for name, norm in zip(names, total.norms.tolist(), strict=True):
        if norm == 0:
            parts.append(_indent(f"- {name} changes nothing, every delta is zero: leave it out"))
    parts.append(
        _indent(
            f"- added together they keep {100 * total.set_cancellation:.0f} % of the sum of their "
            f"norms (unrelated adapters of equal norm: {100 / count**0.5:.0f} %)"
        )
    )
    if count > 2:
        parts.append(
            _indent(
                f"- singular task interference of all {count} together: "
                f"{number(total.set_interference)} (0: apart, about 1: the same)"
            )
        )
    return Group(*parts)


def _norms(total: PairMatrices, names: Sequence[str]) -> RenderableType:
    norms = ", ".join(f"{n} {number(float(v))}" for n, v in zip(names, total.norms, strict=True))
    modules = "1 module" if total.modules == 1 else f"{total.modules} modules"
    text = Text(f"{len(names)} adapters, {modules}", style="bold")
    return text.append(f"\nFrobenius norms: {norms}\n", style="not bold")


def _pairs(
    total: PairMatrices, verdicts: Sequence[Verdict], names: Sequence[str], width: int, plain: bool
) -> RenderableType:
    titles = [_pair(v, names) for v in verdicts]
    if max(map(len, titles)) > max(15, width - 65):  # as the matrix numbers them
        titles = [f"{v.first + 1:>2} / {v.second + 1:>2}" for v in verdicts]
    rows = []
    for v, title in zip(verdicts, titles, strict=True):
        at = (v.first, v.second)
        rows.append(
            [
                title,
                _cosine(v.cosine),
                _meeting(total.overlap_in[at], total.chance_in[at], total.cosine_in[at], plain),
                _meeting(total.overlap_out[at], total.chance_out[at], total.cosine_out[at], plain),
                _times(total.interference[at], total.chance_interference[at]),
                f"{100 * float(total.conflict[at]):.0f} %",
                f"{100 * float(total.conflict_mass[at]):.0f} %",
                f"{float(total.cancellation[at]):.2f}",
                v.kind,
            ]
        )
    heads = ["pair", "cos", "in", "out", "interf", "signs", "mass", "sum", ""]
    return grid(heads, rows, left=(0, 8), plain=plain)


def _kinds(comparison: Comparison, width: int, plain: bool) -> RenderableType:
    """Over all pairs: the mean and the extremes of the cosine by kind of module."""
    rows = []
    for kind in comparison.kinds:
        i, j = _upper(len(comparison.adapters))
        cosine = kind.cosine[i, j]
        excess = kind.interference[i, j] / kind.chance_interference[i, j].clamp_min(1e-12)
        rows.append(
            [
                shorten(kind.label, max(16, width - 52)),
                str(kind.modules),
                *(
                    f"{round(float(x), 3) + 0.0:.3f}"
                    for x in (cosine.min(), cosine.mean(), cosine.max())
                ),
                _times(excess.max(), excess.new_ones(())),
                f"{kind.set_cancellation:.2f}",
            ]
        )
    heads = ["module", "count", "cos min", "mean", "max", "interf", "sum of all"]
    return grid(heads, rows, gap=2, plain=plain)


def _way(way: Trajectory, width: int, plain: bool) -> RenderableType:
    """Checkpoints in their order: how far each moved, and how far it was from the last."""
    names = short_names([step.name for step in way.steps])
    rows = [
        [
            shorten(name, max(16, width - 34)),
            number(step.norm),
            f"{100 * step.moved:.1f} %" if place else "-",
            f"{100 * step.left:.1f} %",
            _cosine(step.cosine),
        ]
        for place, (name, step) in enumerate(zip(names, way.steps, strict=True))
    ]
    return grid(["checkpoint", "norm", "moved", "to last", "cos"], rows, gap=2, plain=plain)


def _upper(count: int) -> tuple[list[int], list[int]]:
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    return [i for i, _ in pairs], [j for _, j in pairs]


def _cosine(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # adding 0 turns -0 into 0


def _meeting(overlap: "Tensor", chance: "Tensor", cosine: "Tensor", plain: bool) -> str:
    """How far two spaces overlap, beside chance, and their smallest angle."""
    if not float(chance) > 0:
        return "-"
    return f"{_times(overlap, chance)} {degrees(cosine, plain):>3}"


def _times(value: "Tensor", chance: "Tensor") -> str:
    if not float(chance) > 0:
        return "-"
    times = float(value / chance)
    return f"{times:.1f}x" if times < 10 else f"{times:.0f}x"


def _pair(verdict: Verdict, names: Sequence[str]) -> str:
    return f"{names[verdict.first]} / {names[verdict.second]}"


def _several(verdicts: Sequence[Verdict], names: Sequence[str]) -> str:
    shown = ", ".join(_pair(v, names) for v in verdicts[:3])
    return shown if len(verdicts) <= 3 else f"{shown} and {len(verdicts) - 3} more pairs"


def _indent(text: str) -> RenderableType:
    return Padding(Text(text), (0, 0, 0, 2), expand=False)
