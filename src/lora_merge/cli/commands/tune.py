"""`lora-merge tune`: which implementation of the gated stack is fastest on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_merge.cli.shared.options import json_option

if TYPE_CHECKING:
    from rich.table import Table

    from lora_merge.kernels.gated_stack.tune import Measured


@click.command(
    epilog="""\b
Examples:
  lora-merge tune                   shapes of Llama-3-8B, 8 experts of rank 16
  lora-merge tune my-mixture        the mixture's own shapes
  lora-merge tune --tokens 1 --experts 28 --rank 8 --json
""",
    short_help="Measure which kernels are fastest on this machine.",
)
@click.argument("mixture", required=False, type=click.Path(path_type=Path))
@click.option("--experts", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True)
@click.option(
    "--tokens", type=click.IntRange(min=1), multiple=True, help="Repeat it.  [default: 1 16 256]"
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Default: bfloat16 on a GPU, float32 else.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--graph", is_flag=True, help="Time CUDA graphs instead of separate launches.")
@click.option("--dry-run", is_flag=True, help="Measure and show, keep nothing.")
@json_option
def command(
    mixture: Path | None,
    experts: int,
    rank: int,
    tokens: tuple[int, ...],
    dtype: str | None,
    device: str,
    rounds: int,
    graph: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Time every implementation of the gated stack, and remember the fastest for each case.

    Mixtures look it up from then on. Without MIXTURE, the modules of Llama-3-8B are timed.
    """
    import torch

    from lora_merge.cli.shared.output import Output
    from lora_merge.files.targets import check_parent
    from lora_merge.kernels.gated_stack.dispatch import device_name, table_path
    from lora_merge.kernels.gated_stack.tune import store, tune
    from lora_merge.kernels.gated_stack.tune_cases import llama_shapes
    from lora_merge.machine.device import pick_device
    from lora_merge.mixture.mixture import Mixture
    from lora_merge.mixture.runtime.fit_to_model import stack_shapes

    output = Output(as_json)
    context = click.get_current_context()
    given = [
        name
        for name in ("experts", "rank")
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    ]
    if mixture is not None and given:
        raise click.UsageError(f"a MIXTURE has its own shapes: no --{given[0]}")
    place = pick_device(device)
    if graph and place.type != "cuda":
        raise click.UsageError("--graph times CUDA graphs, and there is no GPU here")
    if not dry_run:
        check_parent(table_path(device_name(place)), "set XDG_CACHE_HOME to a writable place")
    if place.type != "cuda":
        output.note(f"no GPU: measuring on {place.type}, where only eager and concat run")
    shapes = llama_shapes(experts, rank)
    if mixture is not None:
        shapes = stack_shapes(Mixture.from_pretrained(mixture))
    kind = getattr(torch, dtype or ("bfloat16" if place.type == "cuda" else "float32"))
    rows = []
    counts = tokens or (1, 16, 256)
    with output.progress("cases", 3 * len(shapes) * len(counts)) as step:
        for row in tune(shapes, place, kind, tokens=counts, rounds=rounds, graph=graph):
            rows.append(row)
            step()
    path = None if dry_run else store(rows, place)
    result = {
        "schema": 1,
        "device": rows[0].case.device if rows else place.type,
        "gpu": place.type == "cuda",
        "table": None if path is None else str(path),
        "rows": [row.to_dict() for row in rows],
    }
    output.data(result, _view(rows))
    if path is not None:
        output.note(f"kept in {path}")
    if any(row.fastest in ("concat", "joined") for row in rows):
        output.note('concat and joined run where load_mixture is given layout="rows" or "border"')


def _view(rows: "list[Measured]") -> "Table":
    """Times as ratios to the modules without experts."""
    from lora_merge.cli.shared.output import table

    timed = {name for row in rows for name in row.timings}
    names = [name for name in ("eager", "concat", "triton", "joined", "grouped") if name in timed]
    grid = table("modules, units, tokens, gate", "base ms", *names, "fastest")
    for row in rows:
        case, base = row.case, row.timings["base"].median
        cells = [f"{row.timings[n].median / base:.2f}" if n in row.timings else "-" for n in names]
        title = f"{case.d_in}x{case.d_out} R{case.units} T{case.tokens} {case.gate}"
        grid.add_row(title, f"{base * 1e3:.3f}", *cells, row.fastest)
    return grid
