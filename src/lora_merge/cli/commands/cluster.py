"""`lora-merge cluster`: LoRA-LEGO."""

from typing import Any

import click

from lora_merge.cli.shared.options import adapters_argument, merging_options, run_merge, together

_method_options = together(
    click.option(
        "--units",
        type=click.Choice(["raw", "normalized"]),
        default="raw",
        show_default=True,
        help="Cluster units as they are, or each half at length one.",
    ),
    click.option(
        "--reweight-parameters/--no-reweight-parameters",
        default=True,
        show_default=True,
        help="Restore each centroid's largest entry to its members' mean.",
    ),
    click.option(
        "--reweight-output",
        type=click.Choice(["none", "single", "sum"]),
        default="single",
        show_default=True,
        help="Scale by sqrt(r/k) (as one adapter) or sqrt(R/k) (as their sum).",
    ),
    click.option("--fold-scale", is_flag=True, help="Put sqrt(scaling) into both halves first."),
    click.option("--balance", is_flag=True, help="Bring units to |a| = |b| first."),
    click.option("--sign-invariant", is_flag=True, help="Treat (-a, -b) as the unit it is."),
    click.option("--canonical", is_flag=True, help="Cluster singular units instead of raw ones."),
    click.option(
        "--centroid",
        type=click.Choice(["mean", "rank-one"]),
        default="mean",
        show_default=True,
        help="Mean of the halves, or best rank-one matrix.",
    ),
    click.option(
        "--restarts",
        type=click.IntRange(min=1),
        default=10,
        show_default=True,
        help="k-means++ starts.",
    ),
)
_PARAMETERS = (
    "units",
    "reweight_parameters",
    "reweight_output",
    "fold_scale",
    "balance",
    "sign_invariant",
    "canonical",
    "centroid",
    "restarts",
)


@click.command(
    epilog="""\b
Examples:
  lora-merge cluster math code chat --rank 16
  lora-merge cluster 'runs/*/adapter' --rank 8 --dry-run
  lora-merge cluster a b -w 1 -w -0.5 --rank 16 --fold-scale --balance -o out
""",
    short_help="Cluster rank-wise units into one adapter (LoRA-LEGO).",
)
@adapters_argument
@click.option("--rank", type=click.IntRange(min=1), required=True, help="Rank of the result (k).")
@_method_options
@merging_options
def command(**arguments: Any) -> None:
    """Cluster the rank-wise units of all ADAPTERs into one adapter of rank K.

    Each LoRA is taken apart into rank-one units; k-means groups similar ones, and each cluster's
    centroid becomes one unit of the result (LoRA-LEGO, arXiv 2409.16167). The defaults are the
    published procedure.
    """
    from lora_merge.cli.shared.recipe_options import recipe_from, split_run_options

    run = split_run_options(arguments)
    parameters = [(name, arguments.pop(name)) for name in _PARAMETERS]
    recipe = recipe_from("lego", parameters=parameters, **arguments)
    run_merge(recipe, **run)
