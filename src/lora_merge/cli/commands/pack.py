"""`lora-merge pack`: many adapters in one directory, stored by module."""

from pathlib import Path
from typing import Any

import click

from lora_merge.api.arguments.packing import Pack
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import adapters_argument, json_option


@click.command(
    epilog="""\b
Examples:
  lora-merge pack 'pool/*' -o library --tag task=math
  lora-merge pack user/new-adapter -o library --append --name new
  lora-merge merge library -M tsv --rank 16
  lora-merge info library:new
  lora-merge compare 'library[task=math]'
  lora-merge pack library --check
""",
)
@adapters_argument
@options_of(Pack, needed=False)
@click.option("--name", "names", multiple=True, help="Name of an adapter in it; one for each.")
@click.option("--tag", "tags", multiple=True, metavar="NAME=VALUE", help="Said of all of them.")
@click.option("--check", is_flag=True, help="Read all of a library: is it what was packed?")
@json_option
def command(
    adapters: tuple[str, ...], out: Path | None, check: bool, as_json: bool, **arguments: Any
) -> None:
    """Pack ADAPTERs into a library: one file per module, whatever their number.

    Every command takes the library (all of its adapters), LIBRARY:name and LIBRARY[tag=value].
    Weights and configs are kept byte by byte. docs/scale.md has more.
    """
    from rich.markup import escape

    import lora_merge
    from lora_merge.cli.shared.api import shown_progress
    from lora_merge.cli.shared.output import Output

    output = Output(as_json)
    if check:
        faults = {library: lora_merge.check_library(library) for library in adapters}
        lines = [f"{name}: {'; '.join(f) or 'all is as packed'}" for name, f in faults.items()]
        output.data({"schema": 1, "libraries": faults}, *map(escape, lines))
        if any(faults.values()):
            raise click.exceptions.Exit(1)
        return
    if out is None:
        raise click.UsageError("-o says which library to make")
    arguments["names"] = arguments["names"] or None
    with shown_progress(output) as progress:
        report = lora_merge.pack(list(adapters), out, **arguments, progress=progress)
    output.data(report.to_dict(), escape(str(report.summary())))
