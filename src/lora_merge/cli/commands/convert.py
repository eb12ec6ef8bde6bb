"""`lora-merge convert`: from any dialect to any file format."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_merge.cli.shared.options import force_option, json_option, open_options

if TYPE_CHECKING:
    from lora_merge.reshape.convert import ConvertReport

_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FORMATS = ("peft", "kohya", "diffusers", "comfyui", "mlx")
# Opens deltas of full rank whole; the energy decides what is kept of them.
_WHOLE = 1 << 30


@click.command(
    epilog="""\b
Examples:
  lora-merge convert loha -o lora
  lora-merge convert adapter -o for-mlx --to mlx
  lora-merge convert hra -o lora --base llama
  lora-merge convert oft -o lora --base llama --energy 0.99
  lora-merge convert flux.safetensors -o out --to diffusers --pipeline Flux
""",
    short_help="An adapter of any form in the format of another tool.",
)
@click.argument("adapter")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Directory to make.")
@click.option("--to", type=click.Choice(_FORMATS), help="[default: its own, or peft]")
@click.option(
    "--base",
    type=click.Path(path_type=Path, exists=True),
    help="Base model's directory, for forms and names that depend on it.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Cut every delta at this rank.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Cut every delta where this share of its squared norm is kept.",
)
@click.option("--component", help="Part of a pipeline that PEFT's names belong to: unet, ...")
@click.option("--pipeline", help="Rename by diffusers' converter: StableDiffusionXL, Flux, ...")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="[default: the adapter's]")
@force_option("an adapter directory")
@click.option("--dry-run", is_flag=True, help="Plan from the headers, write nothing.")
@open_options
@json_option
def command(
    adapter: str,
    out: Path | None,
    to: str | None,
    base: Path | None,
    rank: int | None,
    energy: float | None,
    component: str | None,
    pipeline: str | None,
    dtype: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write ADAPTER in another format: exactly where its form is low-rank.

    Forms of full rank (DoRA, OFT, IA3 ...) need --rank or --energy, and the error is told.
    """
    if rank is not None and energy is not None:
        raise click.UsageError("give --rank or --energy, not both")
    if out is None and not dry_run:
        raise click.UsageError("missing option '-o' (or --dry-run)")
    from lora_merge.cli.shared.open import check_out, open_single
    from lora_merge.cli.shared.output import Output
    from lora_merge.files.checkpoint import open_checkpoint
    from lora_merge.reshape.convert import convert, plan_conversion

    output = Output(as_json)
    if out is not None and not dry_run:
        check_out(out, adapter, force=force)
    cut = _WHOLE if energy is not None else rank
    opened = open_single(adapter, base=base, rank=cut, **options)
    model = None if base is None else open_checkpoint(base)
    if pipeline is not None:
        from lora_merge.reshape.diffusers_names import through_diffusers

        opened = through_diffusers(opened, pipeline, base=model)
    plan = plan_conversion(
        opened,
        to=to,
        component=component,
        base=model,
        rank=rank,
        energy=energy,
        dtype=_DTYPES[dtype] if dtype else None,
    )
    for note in opened.notes:
        output.note(note)
    if dry_run or out is None:
        report = plan.report()
        output.data(report.to_dict(), *_view(report))
        return
    with output.progress("converting", len(plan.ranks)) as advance:
        report = convert(plan, out, force=force, on_module=advance)
    output.data(report.to_dict(), *_view(report))


def _view(report: "ConvertReport") -> list[Any]:
    from collections import Counter

    from lora_merge.cli.shared.output import size, span, table

    grid = table("verdict", "modules", "units", "rank", "relative error")
    for verdict, count in sorted(Counter(m.verdict for m in report.modules).items()):
        some = [m for m in report.modules if m.verdict == verdict]
        errors = [m.lost / m.norm for m in some if m.norm]
        units, ranks = [m.units for m in some], [m.rank for m in some]
        grid.add_row(
            verdict,
            str(count),
            span(min(units), max(units)),
            span(min(ranks), max(ranks)),
            f"up to {max(errors):.3g}" if errors else "not cut",
        )
    where = f"wrote {report.out}" if report.out else "would write"
    total = f", cutting lost {100 * report.error:.3g} % of the norm" if report.error else ""
    return [
        f"{report.dialect} to {report.target}: {len(report.modules)} modules{total}",
        grid,
        f"{where} ({size(report.num_bytes)})",
    ]
