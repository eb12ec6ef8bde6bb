"""`lora-merge train`: train a mixture's gate."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_merge.api.arguments.texts import Train
from lora_merge.cli.shared.fields import names_of, options_of
from lora_merge.cli.shared.options import force_option, json_option
from lora_merge.cli.shared.texts import Rows, mixture_argument
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
)
@mixture_argument
@options_of(Train, only=("base", "data"))
@click.option("--eval", "evaluation", type=click.Path(path_type=Path), help="JSON lines.")
@options_of(TrainSettings)
@options_of(Train, without=("base", "data"), about={"resume": "go on from OUT.training, exactly"})
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="To make.")
@force_option("a mixture directory")
@json_option
def command(
    mixture: Path,
    evaluation: Path | None,
    out: Path,
    force: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Train the gate of MIXTURE; its experts stay as they are unless --train-experts or --rank-l1.

    With --rank-l1 every rank gets a weight that is driven to zero unless the loss needs it; ranks
    at zero are left out of the experts that are saved. MIXTURE itself is never changed.

    A checkpoint lies in OUT.training, every step's numbers in OUT.training.metrics.jsonl. A run
    that was killed goes on with --resume to the weights it would have had.
    """
    import lora_merge
    from lora_merge.cli.shared.api import shown_progress
    from lora_merge.cli.shared.open import check_out
    from lora_merge.cli.shared.output import Output
    from lora_merge.mixture.training.processes import is_first, leave

    output = Output(as_json or not is_first())
    settings = {name: arguments.pop(name) for name in names_of(TrainSettings)}
    check_out(out, mixture, arguments["base"], arguments["data"], evaluation, force=force)
    start, rows = lora_merge.Mixture.from_pretrained(mixture), Rows(output)
    history: list[Mapping[str, Any]] = []

    def loss() -> str:
        return f"loss {history[-1]['loss']:.4g}" if history else ""

    with shown_progress(output, loss) as progress:
        trained = lora_merge.train(
            start,
            settings=TrainSettings(**settings),
            evaluation=evaluation or (),
            work=out.with_name(out.name + ".training"),
            on_data=rows,
            on_step=history.append,
            progress=progress,
            **arguments,
        )
    leave()
    if not is_first():
        return
    trained.save_pretrained(out, force=force)
    last = history[-1] if history else {}
    trains = start.spec.signal != "text"  # which is fitted without steps
    result = {
        "schema": 1,
        "out": str(out),
        "rows": rows.count,
        "left_out": rows.faults,
        "steps": settings["steps"] if trains else 0,
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
    from lora_merge.cli.shared.table import table

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
    done = f"wrote {result['out']}: {', '.join(parts)}; {result['rows']} rows"
    if result["steps"]:
        done += f", {result['steps']} steps"
    if result["steps_run"] < result["steps"]:
        done += f" ({result['steps_run']} of them now)"
    return [grid, done] if history else [done]
