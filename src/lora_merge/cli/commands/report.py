"""`lora-merge report`: one page to look at adapters in a browser."""

from collections.abc import Callable
from pathlib import Path

import click

from lora_merge.cli.shared.open import open_all
from lora_merge.cli.shared.options import adapters_argument, bases_option, json_option, open_options


@click.command(
    epilog="""\b
Examples:
  lora-merge report math code chat -o report.html
  lora-merge report 'runs/*' -o runs.html --module '*.q_proj'
""",
    short_help="One interactive page: spectra, heat maps, pairs, warnings.",
)
@adapters_argument
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="File to make.",
)
@click.option(
    "--module", "modules", multiple=True, metavar="GLOB", help="Only these modules. Repeatable."
)
@bases_option
@open_options
@json_option
def command(
    adapters: tuple[str, ...],
    out: Path,
    modules: tuple[str, ...],
    accept_base_models: bool,
    alpha: float | None,
    rslora: bool,
    rename: tuple[str, ...],
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Write what `spectra` and `compare` find of the ADAPTERs as one page.

    It opens from a disk, asks no network for anything, prints, and works by keyboard.
    """
    from contextlib import ExitStack

    import lora_merge
    from lora_merge.cli.shared.output import Output, size
    from lora_merge.files.targets import MARK, check_file

    output = Output(as_json)
    check_file(out, MARK.encode())
    opened = open_all(
        adapters, alpha=alpha, rslora=rslora, allow_pickle=allow_pickle, rename=rename
    )
    with ExitStack() as bars:
        shown: dict[str, Callable[[], None]] = {}

        def advance(what: str, total: int) -> None:
            if what not in shown:
                bars.close()
                shown[what] = bars.enter_context(output.progress(what, total))
            shown[what]()

        document = lora_merge.report(
            opened,
            out,
            modules=modules,
            accept_base_models=accept_base_models,
            on_module=advance,
        )
    written = out.stat().st_size
    warnings = [{"text": w.text, "remedy": w.remedy} for w in document.warnings]
    output.data(
        {"schema": 1, "output": str(out), "bytes": written, "warnings": warnings},
        f"wrote {out}: {size(written)}, {len(warnings)} warnings",
    )
