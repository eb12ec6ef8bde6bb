"""`lora-merge train`: train a mixture's gate."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import force_option, json_option
from lora_merge.cli.shared.texts import ROWS, text_options
from lora_merge.mixture.training.settings import TrainSettings

if TYPE_CHECKING:
    from lora_merge.mixture.mixture import Mixture


@click.command(
    epilog="""\b
Examples:
  lora-merge train mix --base ./llama --data train.jsonl -o trained
  lora-merge train mix --base ./llama --data train.jsonl -o trained --resume
  lora-merge train mix --base ./llama --data a.jsonl --rank-l1 1e-4 -o small
  torchrun --nproc-per-node 4 -m lora_merge train mix --base ./llama ...

Rows are {"text": ...} or {"prompt": ..., "response": ...}, with an optional
"expert", or {"parts": [{"text": ..., "expert": ...}, ...]} for texts that
change their task.
""",
    short_help="Train a mixture's gate, prune its ranks or train its experts.",
)
@text_options
@click.option("--eval", "evaluation", type=ROWS, help="JSON lines.")
@click.option("--max-length", type=click.IntRange(min=2), default=1024, show_default=True)
@click.option("--strict", is_flag=True, help="Refuse the data if any row is bad.")
@options_of(TrainSettings)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
@click.option("--shard", "sharded", is_flag=True, help="Spread the base over processes (FSDP).")
@click.option("--resume", is_flag=True, help="Go on from OUT.training, exactly.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="To make.")
@force_option("a mixture directory")
@json_option
def command(
    mixture: Path,
    base: str,
    data: Path,
    evaluation: Path | None,
    max_length: int,
    strict: bool,
    device: str,
    sharded: bool,
    resume: bool,
    out: Path,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train the gate of MIXTURE; its experts stay as they are unless --train-experts or --rank-l1.

    With --rank-l1 every rank gets a weight that is driven to zero unless the loss needs it; ranks
    at zero are left out of the experts that are saved. MIXTURE itself is never changed.

    A checkpoint lies in OUT.training, every step's numbers in OUT.training.metrics.jsonl. A run
    that was killed goes on with --resume to the weights it would have had.
    """
    import torch

    from lora_merge.cli.shared.open import check_out
    from lora_merge.cli.shared.output import Output
    from lora_merge.mixture.mixture import Mixture
    from lora_merge.mixture.training.base_model import load_base
    from lora_merge.mixture.training.data import read_examples
    from lora_merge.mixture.training.processes import Processes, is_launched, join, leave, shard
    from lora_merge.mixture.training.train import train_gate

    output = Output(as_json)
    chosen = TrainSettings(**settings)
    if sharded and not is_launched():
        raise click.UsageError("--shard spreads the base over processes; start several")
    check_out(out, mixture, base, data, evaluation, force=force)
    start = Mixture.from_pretrained(mixture)
    if is_launched():
        device = str(join(cpu=device == "cpu"))
    first = Processes.current().rank == 0
    model, tokenizer = load_base(base, "cpu" if sharded else device)
    if sharded:
        shard(model, torch.device(device))
    rows = read_examples(data, tokenizer, experts=start.names, max_length=max_length, strict=strict)
    held = (
        read_examples(
            evaluation, tokenizer, experts=start.names, max_length=max_length, strict=strict
        )
        if evaluation
        else None
    )
    if first:
        for fault in (*rows.faults[:5], *(held.faults[:5] if held else ())):
            output.note(f"left out: {fault}")
        if len(rows.faults) > 5:
            output.note(f"{len(rows.faults)} of the rows were left out")
    history: list[Mapping[str, Any]] = []
    with output.progress("training", int(settings["steps"]) if first else 0) as advance:

        def on_step(metrics: Mapping[str, Any]) -> None:
            history.append(metrics)
            advance()

        trained = train_gate(
            model,
            start,
            rows.examples,
            chosen,
            evaluation=held.examples if held else (),
            work=out.with_name(out.name + ".training"),
            resume=resume,
            on_step=on_step,
        )
    leave()
    if not first:
        return
    trained.save_pretrained(out, force=force)
    last = history[-1] if history else {}
    result = {
        "schema": 1,
        "out": str(out),
        "rows": len(rows.examples),
        "left_out": list(rows.faults),
        "steps": settings["steps"],
        "steps_run": len(history),
        "trained": _what(start, settings),
        "ranks_before": _ranks(start),
        "ranks": _ranks(trained),
        "last": dict(last),
    }
    output.data(result, *_view(result, history))


def _what(mixture: "Mixture", settings: Mapping[str, Any]) -> list[str]:
    """What a training changes: the gate if it is learned, and what was asked for."""
    changed = {
        "gate": mixture.spec.is_learned,
        "experts": settings["train_experts"],
        "ranks": settings["rank_l1"] > 0,
    }
    return [name for name, does in changed.items() if does]


def _ranks(mixture: "Mixture") -> int:
    return sum(sum(expert.adapter.ranks().elements()) for expert in mixture.experts)


def _view(result: dict[str, Any], history: list[Mapping[str, Any]]) -> list[Any]:
    from lora_merge.cli.shared.output import table

    grid = table("", "first step", "last step")
    if history:
        first, last = history[0], history[-1]
        for name in ("loss", "task", "balance", "z", "ranks", "eval_loss", "tokens_per_second"):
            if name in last:
                before = f"{first[name]:.4g}" if name in first else "-"
                grid.add_row(name.replace("_", " "), before, f"{last[name]:.4g}")
    trained = [name for name in result["trained"] if name != "ranks"]
    parts = [f"{' and '.join(trained)} trained"] if trained else []
    if "ranks" in result["trained"]:
        parts.append(f"ranks pruned from {result['ranks_before']} to {result['ranks']}")
    done = f"{result['out']}: {', '.join(parts)}; {result['rows']} rows, {result['steps']} steps"
    if result["steps_run"] < result["steps"]:
        done += f" ({result['steps_run']} of them now)"
    return [grid, done] if history else [done]
