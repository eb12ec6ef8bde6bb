"""`lora-merge compare`: which adapters agree, which conflict, and where."""

from typing import Any, Literal

import click

from lora_merge.cli.shared.open import open_all
from lora_merge.cli.shared.options import adapters_argument, bases_option, json_option, open_options


@click.command(
    epilog="""\b
Examples:
  lora-merge compare math code chat
  lora-merge compare math code --module '*.5.*'
  lora-merge compare 'runs/*' --cluster auto
  lora-merge compare 'runs/*' --cluster 4 --algorithm spectral --json
""",
    short_help="All pairs: cosine, overlap, interference; who can be averaged.",
)
@adapters_argument
@click.option("--cluster", metavar="K|auto", help="Group the adapters before merging.")
@click.option(
    "--algorithm",
    type=click.Choice(["agglomerative", "spectral"]),
    default="agglomerative",
    show_default=True,
    help="How to group them.",
)
@click.option(
    "--module",
    "modules",
    multiple=True,
    metavar="GLOB",
    help="Only these modules, with all principal angles. Repeatable.",
)
@click.option("--per-module", is_flag=True, help="Every module's matrices in --json.")
@bases_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampled signs.")
@click.option("--width", type=click.IntRange(min=60), help="Columns.  [default: the terminal's]")
@open_options
@json_option
def command(
    adapters: tuple[str, ...],
    cluster: str | None,
    algorithm: Literal["agglomerative", "spectral"],
    modules: tuple[str, ...],
    per_module: bool,
    accept_base_models: bool,
    seed: int,
    width: int | None,
    alpha: float | None,
    rslora: bool,
    rename: tuple[str, ...],
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Compare all pairs of ADAPTERs on their deltas, without forming them.

    Ends in advice: which can be averaged, which conflict, and in which modules.
    """
    groups = _groups(cluster)
    from lora_merge.analysis.compare import compare
    from lora_merge.analysis.verdicts import judge, judge_set
    from lora_merge.cli.shared.output import Output

    output = Output(as_json, width=width)
    opened = open_all(
        adapters, alpha=alpha, rslora=rslora, allow_pickle=allow_pickle, rename=rename
    )
    names = {name for adapter in opened for name in adapter.modules}
    with output.progress("comparing", len(names)) as advance:
        comparison = compare(
            opened,
            modules=modules,
            angles=bool(modules),
            accept_base_models=accept_base_models,
            seed=seed,
            on_module=advance,
        )
    verdicts = judge(comparison)
    document: dict[str, Any] = comparison.to_dict(per_module=per_module or bool(modules))
    document["verdicts"] = [verdict.to_dict() for verdict in verdicts]
    document["set"] = judge_set(comparison, verdicts).to_dict()
    tree = None
    if len(opened) > 2:
        from lora_merge.analysis.families import tree_of

        tree = tree_of(comparison.total.cosine)
        document["tree"] = tree.to_dict()
    found = None
    if cluster is not None:
        from lora_merge.analysis.families import cluster_adapters

        found = cluster_adapters(comparison.total.cosine, groups, algorithm=algorithm)
        document["clusters"] = found
    if as_json:
        output.data(document)
        return
    from lora_merge.cli.views.compare import comparison_view

    view = comparison_view(comparison, verdicts, tree, width=output.width, plain=output.plain)
    output.data(document, view, *(_cluster_lines(found, comparison.adapters) if found else []))


def _groups(text: str | None) -> int | None:
    if text is None or text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise click.UsageError(f"--cluster takes a number or auto, not {text!r}")
    return int(text)


def _cluster_lines(found: list[int], adapters: tuple[str, ...]) -> list[str]:
    lines = [f"\n{len(set(found))} group{'s' if len(set(found)) > 1 else ''}"]
    for group in sorted(set(found)):
        members = [a for a, g in zip(adapters, found, strict=True) if g == group]
        lines.append(f"  {group + 1}: {' '.join(members)}")
    return lines
