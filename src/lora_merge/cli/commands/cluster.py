"""`lora-merge cluster`: LoRA-LEGO."""

from pathlib import Path
from typing import Any

import click

from lora_merge.cli.shared.fields import names_of, options_of
from lora_merge.cli.shared.options import adapters_argument, together
from lora_merge.cli.shared.recipe_options import (
    explain_clusters,
    merging_options,
    parse_parameters,
    recipe_from,
    run_merge,
    scale_option,
    split_run_options,
)
from lora_merge.merge.methods.lego_options import LegoOptions

_published_options = together(
    click.option(
        "--as-published",
        is_flag=True,
        help="LoRA-LEGO as its authors have it: units as stored, centroids averaged. So does each "
        "of the options from here to --centroid.",
    ),
    options_of(LegoOptions, without=("restarts",), unset=True),
)
_further_options = together(
    options_of(LegoOptions, only=("restarts",)),
    click.option(
        "-p",
        "--param",
        "parameters",
        multiple=True,
        metavar="NAME=VALUE",
        help="Parameter of `lora-merge methods lego-refit` (or of `lego`, as published).",
    ),
    click.option(
        "--explain",
        is_flag=True,
        help="Show the clusters, who is in them and what is lost; write no adapter.",
    ),
    click.option(
        "--html",
        type=click.Path(path_type=Path),
        help="With --explain: write a page that shows every unit.",
    ),
)
_PUBLISHED = tuple(name for name in names_of(LegoOptions) if name != "restarts")


@click.command(
    epilog="""\b
Examples:
  lora-merge cluster math code chat --rank 16
  lora-merge cluster 'runs/*/adapter' --rank 8 --dry-run
  lora-merge cluster math code chat --rank 16 --explain --html units.html
  lora-merge cluster math code chat --rank 16 --as-published --balance -o out
""",
)
@adapters_argument
@click.option("--rank", type=click.IntRange(min=1), required=True, help="Rank of the result (k).")
@scale_option
@_published_options
@_further_options
@merging_options
def command(**arguments: Any) -> None:
    """Cluster the rank-wise units of all ADAPTERs into one adapter of rank K.

    Each LoRA is taken apart into rank-one units and k-means groups similar ones (LoRA-LEGO, arXiv
    2409.16167). As published, the mean of a group becomes a unit of the result. By default groups
    are of singular units, and their units are refitted together to what a merge of all adapters
    should do; docs/cluster.md has what that buys.
    """
    run = split_run_options(arguments)
    given = {name: arguments.pop(name) for name in _PUBLISHED}
    variants = {name: value for name, value in given.items() if value not in (None, False)}
    if given["reweight_parameters"] is False:
        variants["reweight_parameters"] = False
    published = arguments.pop("as_published") or bool(variants)
    explain, html = arguments.pop("explain"), arguments.pop("html")
    if html and not explain:
        raise click.UsageError("--html needs --explain")
    parameters = [*variants.items(), ("restarts", arguments.pop("restarts"))]
    parameters += parse_parameters(arguments.pop("parameters"))
    method = "lego" if published else "lego-refit"
    recipe = recipe_from(method, parameters=parameters, **arguments)
    if explain:
        explain_clusters(recipe, html, **run)
    else:
        run_merge(recipe, **run)
