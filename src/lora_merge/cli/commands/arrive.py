"""`lora-merge arrive`: adapters one by one into a fixed number of slots."""

from typing import Any

import click

from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import adapters_argument, json_option
from lora_merge.merge.recipe.arguments import Arrive


@click.command(
    epilog="""\b
Examples:
  lora-merge arrive math code chat --into slots --slots 2
  lora-merge arrive poems --into slots --slots 2
  lora-merge gate 'slots/slot-*' -o mixture
""",
)
@adapters_argument
@options_of(Arrive)
@json_option
def command(adapters: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Take ADAPTERs, one after the other, into at most K slots (K-Merge).

    An adapter gets a slot of its own while one is free. Then it joins the slot most like it, which
    becomes the mean of all who are in it. Every slot is an adapter that loads everywhere, and
    slots.json says who is where. The directory is replaced whole, or stays as it was.
    """
    import lora_merge
    from lora_merge.cli.shared.output import Output, percent
    from lora_merge.cli.shared.table import table
    from lora_merge.printing import short_names

    output = Output(as_json)
    report = lora_merge.arrive(adapters, **given)
    names = [member.name for members in report.slots.values() for member in members]
    short = dict(zip(names, short_names(names), strict=True))
    grid = table("adapter", "slot", "cosine with it", "kept")
    for arrival in report.arrivals:
        cosine = f"{arrival.cosines[arrival.slot]:.3f}" if arrival.merged else "its own"
        grid.add_row(short[arrival.adapter], arrival.slot, cosine, percent(arrival.kept))
    lines = [f"wrote {report.folder}: {len(report.slots)} slots"]
    for slot, members in report.slots.items():
        lines.append(f"  {slot}: {' + '.join(short[member.name] for member in members)}")
    output.data(report.to_dict(), grid, *lines)
