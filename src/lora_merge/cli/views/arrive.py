"""What became of adapters that arrived, for a terminal."""

from rich.console import RenderableType

from lora_merge.cli.shared.output import percent, table
from lora_merge.merge.arrive import ArrivalReport
from lora_merge.printing import short_names


def arrivals_view(report: ArrivalReport) -> list[RenderableType]:
    """One line per arrival, then who is in each slot."""
    names = [member.name for members in report.slots.values() for member in members]
    short = dict(zip(names, short_names(names), strict=True))
    grid = table("adapter", "slot", "cosine with it", "kept")
    for arrival in report.arrivals:
        cosine = f"{arrival.cosines[arrival.slot]:.3f}" if arrival.merged else "its own"
        grid.add_row(short[arrival.adapter], arrival.slot, cosine, percent(arrival.kept))
    lines = [
        f"  {slot}: {' + '.join(short[m.name] for m in members)}"
        for slot, members in report.slots.items()
    ]
    return [grid, f"wrote {report.library}: {len(report.slots)} slots", *lines]
