"""Tables that show a merge: the plan before it, the report after it."""

import torch
from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from lora_merge.adapters.module_names import place_of
from lora_merge.cli.shared.output import percent, size
from lora_merge.cli.shared.table import table
from lora_merge.cli.views.format import dashed
from lora_merge.machine.device import free_bytes
from lora_merge.merge.plan import MergePlan
from lora_merge.merge.report import GroupReport, MergeReport

_MEANING = (
    "Neither is a loss of quality: unrelated adapters should not become their sum.\n"
    "How good a merge is, lora-merge evaluate tells; docs/which-method.md says more."
)


def plan_view(plan: MergePlan, jobs: int, device: torch.device) -> list[RenderableType]:
    """A plan for a terminal."""
    further = ("own parameters",) if any(plan.own) else ()
    sources = table("adapter", "weight", "modules", "rank", *further)
    for index in plan.by_name:
        adapter, weight = plan.alignment.adapters[index], plan.weights[index]
        ranks = sorted(adapter.ranks())
        sources.add_row(
            Text(adapter.name),
            str(weight),
            str(len(adapter.modules)),
            dashed(ranks),
            *([", ".join(f"{n} {v}" for n, v in plan.own[index].items())] if further else []),
        )
    kinds: dict[str, list[tuple[int, int, str]]] = {}
    for module in plan.alignment.modules:
        shape = f"{module.first.d_out} x {module.first.d_in}"
        entry = (module.num_units, plan.ranks[module.name], shape)
        kinds.setdefault(place_of(module.name).part, []).append(entry)
    kinds_table = table("kind", "modules", "shape", "units in", "rank out")
    for kind, entries in kinds.items():
        units, ranks = [e[0] for e in entries], [e[1] for e in entries]
        shapes = sorted({e[2] for e in entries})
        kinds_table.add_row(
            escape(kind),
            str(len(entries)),
            shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes",
            dashed(units),
            dashed(ranks),
        )
    at_most = "at most " if plan.measured else ""
    return [
        sources,
        kinds_table,
        f"{plan.method.name} would write {at_most}{size(plan.output.num_bytes)} "
        f"({plan.output.dtype})",
        f"{_memory(device)} about {size(plan.peak_bytes(jobs))} beyond torch itself, "
        f"with {jobs} job{'s' if jobs > 1 else ''}",
    ]


def _memory(device: torch.device) -> str:
    if device.type == "cpu":
        return "working memory"
    return f"memory of {device} ({size(free_bytes(device))} free)"


def report_view(report: MergeReport) -> list[RenderableType]:
    """A report for a terminal."""
    total = report.total()
    clusters = ("clusters up to",) if total.largest_clusters else ()
    kept = ("kept",) if total.retained < 0.9995 else ()
    grid = table("kind", "modules", "units", "rank", "error", "norm", *kept, *clusters)
    groups = report.groups()
    for group in groups:
        grid.add_row(*_row(group, bool(kept)))
    if len(groups) > 1:
        grid.add_section()
        grid.add_row(*_row(total, bool(kept)), style="bold")
    return [
        grid,
        "error: distance from the exact sum; norm: of the result; both over the sum's"
        + ("\nkept: share of the result's energy that the cut to its rank left" if kept else ""),
        *([_MEANING] if (total.relative_error or 0) > 0.1 else []),
        f"scale: {report.scale:g}" + (" (auto)" if report.scale_reason else ""),
        escape(f"wrote {report.out} ({size(report.num_bytes)})"),
    ]


def _row(group: GroupReport, kept: bool) -> list[str]:
    row = [
        escape(group.name),
        str(group.modules),
        dashed(group.num_units),
        dashed(group.rank),
        percent(group.relative_error),
        "-" if group.norm_ratio is None else f"{group.norm_ratio:.2f}",
        *([percent(group.retained)] if kept else []),
    ]
    if group.largest_clusters:
        mean, largest = group.largest_clusters
        row.append(f"{mean:.1f}, {largest}")
    return row
