"""`lora-merge report`: one page to look at adapters in a browser."""

from typing import Any

import click

from lora_merge.api.arguments.looking import Report
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import adapters_argument, json_option


@click.command(
    epilog="""\b
Examples:
  lora-merge report math code chat -o report.html
  lora-merge report 'runs/*' -o runs.html --module '*.q_proj'
""",
)
@adapters_argument
@options_of(Report)
@json_option
def command(adapters: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Write what `spectra` and `compare` find of the ADAPTERs as one page.

    It opens from a disk, asks no network for anything, prints, and works by keyboard.
    """
    import lora_merge
    from lora_merge.cli.shared.api import shown_progress
    from lora_merge.cli.shared.output import Output, size

    output, out = Output(as_json), given["out"]
    with shown_progress(output) as progress:
        document = lora_merge.report(adapters, **given, progress=progress)
    written = out.stat().st_size
    warnings = [{"text": w.text, "remedy": w.remedy} for w in document.warnings]
    output.data(
        {"schema": 1, "output": str(out), "bytes": written, "warnings": warnings},
        f"wrote {out}: {size(written)}, {len(warnings)} warnings",
    )
