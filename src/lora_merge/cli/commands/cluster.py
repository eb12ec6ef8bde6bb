"""`lora-merge cluster`: LoRA-LEGO."""

from typing import Any

import click

from lora_merge.cli.shared.options import adapters_argument, merging_options, run_merge, together

_published_options = together(
    click.option(
        "--as-published",
        is_flag=True,
        help="LoRA-LEGO as its authors have it: units as stored, centroids averaged. So does each "
        "of the options from here to --centroid.",
    ),
    click.option(
        "--units",
        type=click.Choice(["raw", "normalized"]),
        help="Cluster units as they are, or each half at length one.  [default: raw]",
    ),
    click.option(
        "--reweight-parameters/--no-reweight-parameters",
        default=None,
        help="Restore each centroid's largest entry to its members' mean.  [default: yes]",
    ),
    click.option(
        "--reweight-output",
        type=click.Choice(["none", "single", "sum"]),
        help="Scale by sqrt(r/k) (as one adapter) or sqrt(R/k) (as their sum).  [default: single]",
    ),
    click.option("--fold-scale", is_flag=True, help="Put sqrt(scaling) into both halves first."),
    click.option("--balance", is_flag=True, help="Bring units to |a| = |b| first."),
    click.option("--sign-invariant", is_flag=True, help="Treat (-a, -b) as the unit it is."),
    click.option("--canonical", is_flag=True, help="Cluster singular units instead of raw ones."),
    click.option(
        "--centroid",
        type=click.Choice(["mean", "rank-one"]),
        help="Mean of the halves, or best rank-one matrix.  [default: mean]",
    ),
)
_further_options = together(
    click.option(
        "--restarts",
        type=click.IntRange(min=1),
        default=10,
        show_default=True,
        help="k-means++ starts.",
    ),
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
        help="Show the clusters, who is in them and what is lost; write nothing.",
    ),
)
_PUBLISHED = (
    "units",
    "reweight_parameters",
    "reweight_output",
    "fold_scale",
    "balance",
    "sign_invariant",
    "canonical",
    "centroid",
)


@click.command(
    epilog="""\b
Examples:
  lora-merge cluster math code chat --rank 16
  lora-merge cluster 'runs/*/adapter' --rank 8 --dry-run
  lora-merge cluster math code chat --rank 16 --explain
  lora-merge cluster math code chat --rank 16 --as-published --balance -o out
""",
    short_help="Cluster rank-wise units into one adapter (LoRA-LEGO).",
)
@adapters_argument
@click.option("--rank", type=click.IntRange(min=1), required=True, help="Rank of the result (k).")
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
    from lora_merge.cli.shared.options import explain_clusters
    from lora_merge.cli.shared.recipe_options import (
        parse_parameters,
        recipe_from,
        split_run_options,
    )

    run = split_run_options(arguments)
    given = {name: arguments.pop(name) for name in _PUBLISHED}
    variants = {name: value for name, value in given.items() if value not in (None, False)}
    if given["reweight_parameters"] is False:
        variants["reweight_parameters"] = False
    published = arguments.pop("as_published") or bool(variants)
    explain = arguments.pop("explain")
    parameters = [*variants.items(), ("restarts", arguments.pop("restarts"))]
    parameters += parse_parameters(arguments.pop("parameters"))
    method = "lego" if published else "lego-refit"
    recipe = recipe_from(method, parameters=parameters, **arguments)
    if explain:
        explain_clusters(recipe, **run)
    else:
        run_merge(recipe, **run)
