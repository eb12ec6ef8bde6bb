"""`lora-merge info`: what an adapter is."""

import click

from lora_merge.cli.shared.options import adapters_argument, json_option, open_options


@click.command(short_help="What an adapter is: modules, ranks, norms, oddities.")
@adapters_argument
@open_options
@json_option
def command(
    adapters: tuple[str, ...],
    alpha: float | None,
    rslora: bool,
    rename: tuple[str, ...],
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Show what ADAPTERs are: format, base model, modules, ranks, norms, and what is odd."""
    from lora_merge.analysis.info import describe
    from lora_merge.cli.shared.open import open_all
    from lora_merge.cli.shared.output import Output
    from lora_merge.cli.views.info import info_view

    output = Output(as_json)
    opened = open_all(
        adapters, alpha=alpha, rslora=rslora, allow_pickle=allow_pickle, rename=rename
    )
    with output.progress("reading", sum(len(one.modules) for one in opened)) as advance:
        infos = [describe(one, on_module=advance) for one in opened]
    data = [info.to_dict() for info in infos]
    shown = [part for info in infos for part in info_view(info)]
    output.data(data[0] if len(data) == 1 else {"schema": 1, "adapters": data}, *shown)
