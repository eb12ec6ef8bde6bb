"""`lora-merge tune`: which implementation of the gated stack is fastest on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_merge.api.arguments.tuning import Tune
from lora_merge.cli.shared.fields import options_of
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
  lora-merge tune --check           which kernels this Triton compiles
""",
)
@click.argument("mixture", required=False, type=click.Path(path_type=Path))
@options_of(Tune)
@click.option("--check", is_flag=True, help="Measure nothing: say which kernels compile here.")
@json_option
def command(mixture: Path | None, check: bool, as_json: bool, **given: Any) -> None:
    """Time every implementation of the gated stack, and remember the fastest for each case.

    Mixtures look it up from then on. Without MIXTURE, the modules of Llama-3-8B are timed. With
    --check nothing is timed: every kernel is compiled, for this GPU, or without one for compute
    capability 8.0, 8.9, 9.0 and 10.0; exit code 1 if one does not.
    """
    if check:
        _check(given["device"], as_json)
        return
    _refuse_shapes(mixture)
    import lora_merge
    from lora_merge.cli.shared.api import shown_progress
    from lora_merge.cli.shared.output import Output
    from lora_merge.kernels.gated_stack.dispatch import device_name, table_path
    from lora_merge.machine.device import pick_device

    output, place = Output(as_json), pick_device(given["device"])
    if place.type != "cuda":
        output.note(f"no GPU: measuring on {place.type}, where only eager and concat run")
    with shown_progress(output) as progress:
        rows = lora_merge.tune(mixture, **given, progress=progress)
    path = None if given["dry_run"] else table_path(device_name(place))
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


def _refuse_shapes(mixture: Path | None) -> None:
    context = click.get_current_context()
    for name in ("experts", "rank"):
        source = context.get_parameter_source(name)
        if mixture is not None and source is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"a MIXTURE has its own shapes: no --{name}")


def _check(device: str, as_json: bool) -> None:
    """Compile each kernel, with every tile, gate and dtype that it can be asked for."""
    import lora_merge
    from lora_merge.cli.shared.api import shown_progress
    from lora_merge.cli.shared.output import Output
    from lora_merge.cli.shared.table import table
    from lora_merge.errors import MethodError

    output = Output(as_json)
    with shown_progress(output) as progress:
        found = lora_merge.check_kernels(device, progress=progress)
    grid = table("kernel", "compute capability", "compiled", "failed", "registers", "spilled")
    for kernel in dict.fromkeys(one.kernel for one in found.launches):
        for capability in found.capabilities:
            own = [
                one
                for one in found.launches
                if (one.kernel, one.capability) == (kernel, capability)
            ]
            bad = sum(bool(one.error) for one in own)
            most = [
                max((getattr(one, n) for one in own), default=0) for n in ("registers", "spilled")
            ]
            grid.add_row(
                kernel, f"{capability / 10}", str(len(own) - bad), str(bad), *map(str, most)
            )
    output.data(found.to_dict(), grid)
    for one in found.failed:
        output.note(f"{one.kernel}, compute capability {one.capability / 10}: {one.error}")
    if found.failed:
        raise MethodError(
            f"triton {found.triton}: {len(found.failed)} of {len(found.launches)} launches do not "
            "compile",
            "pip install 'lora-merge[kernels]', or leave it: mixtures run eager instead",
        )


def _view(rows: "list[Measured]") -> "Table":
    """Times as ratios to the modules without experts."""
    from lora_merge.cli.shared.table import table

    timed = {name for row in rows for name in row.timings}
    names = [name for name in ("eager", "concat", "triton", "joined", "grouped") if name in timed]
    grid = table("modules, units, tokens, gate", "base ms", *names, "fastest")
    for row in rows:
        case, base = row.case, row.timings["base"].median
        cells = [f"{row.timings[n].median / base:.2f}" if n in row.timings else "-" for n in names]
        title = f"{case.d_in}x{case.d_out} R{case.units} T{case.tokens} {case.gate}"
        grid.add_row(title, f"{base * 1e3:.3f}", *cells, row.fastest)
    return grid
