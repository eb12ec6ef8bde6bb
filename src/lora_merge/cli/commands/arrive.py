"""`lora-merge arrive`: adapters one by one into a fixed number of slots."""

from pathlib import Path

import click

from lora_merge.cli.shared.options import adapters_argument, json_option


@click.command(
    epilog="""\b
Examples:
  lora-merge arrive math code chat --into library --slots 2
  lora-merge arrive poems --into library --slots 2
  lora-merge gate 'library/slot-*' -o mixture
""",
)
@adapters_argument
@click.option(
    "--into",
    "library",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory of slots; made if it is not there.",
)
@click.option(
    "--slots", type=click.IntRange(min=1), required=True, help="K, how many there may be."
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Rank of merged slots.  [default: the largest of slot and adapter]",
)
@click.option(
    "--threshold",
    type=click.FloatRange(-1, 1),
    help="Cosine from which an adapter joins a slot while others are free.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Worker threads.  [default: CPUs]")
@click.option("--device", default="auto", show_default=True, help="Where to compute.")
@json_option
def command(
    adapters: tuple[str, ...],
    library: Path,
    slots: int,
    rank: int | None,
    threshold: float | None,
    jobs: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Take ADAPTERs, one after the other, into a library of at most K slots (K-Merge).

    An adapter gets a slot of its own while one is free. Then it joins the slot most like it, which
    becomes the mean of all who are in it. Every slot is an adapter that loads everywhere, and
    library.json says who is where. The library is replaced whole, or stays as it was.
    """
    import lora_merge
    from lora_merge.cli.shared.output import Output, percent, table
    from lora_merge.printing import short_names

    output = Output(as_json)
    report = lora_merge.arrive(
        adapters,
        library,
        slots=slots,
        rank=rank,
        threshold=threshold,
        jobs=jobs,
        device=device,
    )
    names = [member.name for members in report.slots.values() for member in members]
    short = dict(zip(names, short_names(names), strict=True))
    grid = table("adapter", "slot", "cosine with it", "kept")
    for arrival in report.arrivals:
        cosine = f"{arrival.cosines[arrival.slot]:.3f}" if arrival.merged else "its own"
        grid.add_row(short[arrival.adapter], arrival.slot, cosine, percent(arrival.kept))
    lines = [f"wrote {report.library}: {len(report.slots)} slots"]
    for slot, members in report.slots.items():
        lines.append(f"  {slot}: {' + '.join(short[member.name] for member in members)}")
    output.data(report.to_dict(), grid, *lines)
