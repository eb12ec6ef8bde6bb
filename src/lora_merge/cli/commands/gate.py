"""`lora-merge gate`: put adapters and a gate into one mixture directory."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import (
    Choice,
    bases_option,
    force_option,
    json_option,
    pickle_option,
)
from lora_merge.mixture.gates.gate import PRESETS, GateSpec
from lora_merge.options import LARGEST_SEED


@click.command(
    epilog="""\b
Examples:
  lora-merge gate math code chat --preset arrow -o mix
  lora-merge gate math code --preset xlora --hidden-size 4096 -o mix
  lora-merge gate law --into mix -o bigger
  lora-merge gate --from xlora-checkpoint --base ./llama -o mix
  lora-merge gate --fresh 64 --preset smora --top-k 8 --base ./llama -o new
""",
)
@click.argument("adapters", nargs=-1, metavar="ADAPTER...")
@click.option(
    "--preset",
    type=Choice(list(PRESETS)),
    metavar="PRESET",
    default="arrow",
    show_default=True,
    help="The gate, one of those above.",
)
@options_of(GateSpec, unset=True)
@click.option("--name", "names", multiple=True, help="Name of an expert; repeat it, in order.")
@click.option(
    "--general", multiple=True, help="Adapter to subtract from every expert (arrow); repeatable."
)
@click.option("--into", type=click.Path(path_type=Path), help="Mixture to add the adapters to.")
@click.option(
    "--from",
    "checkpoint",
    type=click.Path(path_type=Path),
    help="X-LoRA directory or MeteoRA file to read; ADAPTERs are its experts, in its order.",
)
@click.option(
    "--fresh",
    type=click.IntRange(min=1),
    metavar="RANK",
    help="New experts of this rank to train from scratch; one, or one per --name.",
)
@click.option("--base", help="Base model: --fresh adapts its layers, --from asks their order.")
@click.option("--hidden-size", type=click.IntRange(min=1), help="xlora: width of the base model.")
@click.option(
    "--seed",
    type=click.IntRange(0, LARGEST_SEED),
    default=0,
    show_default=True,
    help="Of gates that are drawn.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("mixture"),
    show_default=True,
    help="Directory to make.",
)
@bases_option
@force_option("a mixture directory")
@click.option("--dry-run", is_flag=True, help="Show what it would be, write nothing.")
@pickle_option
@json_option
def command(
    adapters: tuple[str, ...],
    preset: str,
    names: tuple[str, ...],
    general: tuple[str, ...],
    into: Path | None,
    checkpoint: Path | None,
    fresh: int | None,
    base: str | None,
    hidden_size: int | None,
    seed: int,
    out: Path,
    accept_base_models: bool,
    force: bool,
    dry_run: bool,
    allow_pickle: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Put ADAPTERs and a gate into one directory that `load_mixture` attaches to a model.

    \b
    arrow, spectr, hilora,  need no training
    sequence
    constant, request       weights, or one expert per batch row, from the caller
    recall, xlora, meteora, start untrained: run `lora-merge train` on the result
    smora
    phatgoose               one gate vector per expert, each trained on its own
    retrieve                one expert per prompt, of hundreds, by the texts of
                            each; `train` reads them
    """  # noqa: D301 -- click's mark is the character itself
    import lora_merge
    from lora_merge.cli.shared.open import check_out
    from lora_merge.cli.shared.output import Output
    from lora_merge.cli.views.info import mixture_data, mixture_view

    output = Output(as_json)
    if not adapters and checkpoint is None and fresh is None:
        raise click.UsageError("name at least one ADAPTER")
    if fresh is not None and (adapters or general or into or checkpoint or base is None):
        raise click.UsageError("--fresh makes its own experts for --base: name no others")
    _check_together(into, checkpoint, general, settings)
    if not dry_run:
        check_out(out, *adapters, *general, into, checkpoint, base, force=force)
    chosen = {k: v for k, v in settings.items() if v not in (None, False, ())}
    opened = partial(lora_merge.open_adapters, allow_pickle=allow_pickle)
    if checkpoint is not None:
        mixture = lora_merge.import_mixture(
            checkpoint, adapters, base=base, allow_pickle=allow_pickle, **chosen
        )
    elif into is not None:
        mixture = lora_merge.append_experts(
            into,
            opened(adapters),
            names=names or None,
            seed=seed,
            accept_base_models=accept_base_models,
        )
    elif fresh is not None and base is not None:
        mixture = lora_merge.fresh_mixture(
            base,
            fresh,
            preset,
            names=names or ("fresh",),
            seed=seed,
            hidden_size=hidden_size,
            settings=chosen,
        )
    else:
        mixture = lora_merge.Mixture(
            opened(adapters),
            preset,
            names=names or None,
            general=opened(general),
            seed=seed,
            hidden_size=hidden_size,
            accept_base_models=accept_base_models,
            **chosen,
        )
    if not dry_run:
        mixture.save_pretrained(out, force=force)
    for note in mixture.notes:
        output.note(note)
    if not mixture.spec.trained:
        more = " --train-experts" if fresh else ""
        output.note(
            f"the {mixture.spec.preset} gate is untrained; next: lora-merge train {out}{more}"
        )
    wrote = () if dry_run else (f"\nwrote {out}",)
    output.data(mixture_data(mixture, None if dry_run else out), *mixture_view(mixture), *wrote)


def _check_together(
    into: Path | None, checkpoint: Path | None, general: tuple[str, ...], settings: dict[str, Any]
) -> None:
    """A gate that exists already is not changed on the side."""
    if into is None and checkpoint is None:
        return
    free = () if checkpoint is None else ("top_k", "temperature")
    given = [k for k, v in settings.items() if v not in (None, False, ()) and k not in free]
    source = click.get_current_context().get_parameter_source("preset")
    preset = source is not click.core.ParameterSource.DEFAULT
    if given or general or preset or (into is not None and checkpoint is not None):
        option = "--from" if into is None else "--into"
        raise click.UsageError(f"{option} keeps the gate that is there: no preset, no settings")
