"""`lora-merge merge`: any method."""

from typing import Any

import click

from lora_merge.cli.shared.method_names import complete_method
from lora_merge.cli.shared.options import Choice, WeightType, adapters_argument, together
from lora_merge.cli.shared.recipe_options import (
    merging_options,
    parse_parameters,
    recipe_from,
    run_merge,
    semantics_options,
    split_run_options,
)

_method_options = together(
    click.option(
        "-M",
        "--method",
        default="auto",
        show_default=True,
        shell_complete=complete_method,
        help="Method; see `lora-merge methods`.",
    ),
    click.option(
        "--rank",
        help="Rank of the result: a number, energy:0.95, elbow, budget:x0.5, budget:N, full.  "
        "[default: the method's]",
    ),
    click.option(
        "-p",
        "--param",
        "parameters",
        multiple=True,
        metavar="NAME=VALUE",
        help="Parameter of the method; repeat it. See `lora-merge methods METHOD`. The same one "
        "once per adapter, in their order, gives each its own.",
    ),
    click.option(
        "--density",
        type=WeightType(),
        multiple=True,
        metavar="NUMBER",
        help="Short for -p density=...",
    ),
    click.option(
        "--compat",
        type=Choice(["authors", "peft", "mergekit"]),
        help="Short for -p compat=...: whose code to agree with where they differ.",
    ),
    click.option(
        "--side",
        type=Choice(["input", "output", "both"]),
        help="Short for -p side=... (wudi).",
    ),
)
_end_options = together(
    click.option(
        "--schedule",
        metavar="NAME",
        help="Weights over checkpoints of one run, the oldest first (checkpoint-500 before "
        "checkpoint-1000): uniform, linear, last:K, ema:0.95, power:0.2. Their mean, unless -M.",
    ),
    click.option("--strict", is_flag=True, help="Fail if the cut to a rank loses over half."),
    click.option("--print-recipe", is_flag=True, help="Print the recipe and stop."),
)


@click.command(
    epilog="""\b
Examples:
  lora-merge merge math code chat --rank 16
  lora-merge merge a b -M ties --density 0.3 -w 1 -w 0.5
  lora-merge merge a b -M dare --density 0.3 --density '[0.2, 0.8]'
  lora-merge merge a b -M svd --rank energy:0.95 -w '[0.2, 1.0]' -w 0.8
  lora-merge merge a b c -M wudi -p side=output --scale 0.65 -o out
  lora-merge merge 'run/checkpoint-*' --schedule ema:0.9
""",
)
@adapters_argument
@_method_options
@semantics_options
@_end_options
@merging_options
def command(parameters: tuple[str, ...], **arguments: Any) -> None:
    """Merge ADAPTERs into one.

    A weight is a number; a list of numbers, spread over the layers; or a list of
    {filter: pattern of module names, value: number}, of which the first that matches counts. So
    is a density, and what else says how an adapter is made sparse.
    """
    import sys

    run = split_run_options(arguments)
    strict, print_recipe = arguments.pop("strict"), arguments.pop("print_recipe")
    given = parse_parameters(parameters)
    given += [("density", value) for value in arguments.pop("density")]
    short = {name: arguments.pop(name) for name in ("compat", "side")}
    given += [(name, value) for name, value in short.items() if value is not None]
    method = arguments.pop("method")
    schedule = arguments.pop("schedule")
    if schedule is not None:
        method = "mean" if method == "auto" else method
        arguments |= _scheduled(schedule, arguments)
    recipe = recipe_from(method, parameters=given, **arguments)
    if print_recipe and run["as_json"]:
        raise click.UsageError("--print-recipe prints YAML: leave --json out")
    if print_recipe:
        sys.stdout.write(recipe.to_yaml())
        return
    run_merge(recipe, strict=strict, **run)


def _scheduled(schedule: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The adapters in the order of the run, and their weights."""
    from lora_merge.adapters.references import expand, in_order
    from lora_merge.merge.auto.schedule import schedule_weights

    if arguments["weights"]:
        raise click.UsageError("--schedule gives the weights: leave -w out")
    adapters = in_order(expand(arguments["adapters"]))
    return {"adapters": adapters, "weights": schedule_weights(schedule, len(adapters))}
