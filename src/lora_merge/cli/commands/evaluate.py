"""`lora-merge evaluate`: how good adapters, merges and mixtures are, on your rows."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_merge.cli.shared.options import json_option
from lora_merge.cli.shared.texts import ROWS, batch_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_merge.evaluation.evaluate import Evaluation


@click.command(
    epilog="""\b
Examples:
  lora-merge evaluate math code merged --base ./llama --data test.jsonl
  lora-merge evaluate merged mix --base llama --data test.jsonl --metric loss
  lora-merge evaluate merged --base ./llama --data test.jsonl \\
      --metric 'command:python score.py'

\b
A row is {"text": ...}, {"prompt": ..., "response": ...},
{"prompt": ..., "choices": [...], "answer": 0} or {"text": ..., "label": 0},
with an optional "task", whose scores get a column of their own. If an adapter
is called like a task, "of own" compares with it: 100 % is as good as each
task's own adapter. A program is given JSON lines {prompt, response, output}
and prints a number; more is better.
""",
    short_help="Score adapters, merges and mixtures on rows.",
)
@click.argument("subjects", nargs=-1, required=True, metavar="ADAPTER|MIXTURE...")
@click.option("--base", required=True, help="Base model: a directory or a Hub id.")
@click.option("--data", type=ROWS, required=True, help="JSON lines.")
@click.option(
    "--metric",
    default="auto",
    show_default=True,
    help="loss, accuracy, exact-match, or command:PROGRAM.",
)
@batch_options
@click.option("--no-cache", is_flag=True, help="Measure again what was measured before.")
@json_option
def command(
    subjects: tuple[str, ...],
    base: str,
    data: Path,
    metric: str,
    max_length: int,
    batch_size: int,
    device: str,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Score the base model, adapters and mixtures on the rows of DATA, side by side."""
    from lora_merge.cli.shared.output import Output
    from lora_merge.evaluation.evaluate import evaluate

    output = Output(as_json)
    with output.progress("evaluating", len(subjects) + 1) as advance:
        found = evaluate(
            list(subjects),
            base=base,
            data=data,
            metric=metric,
            max_length=max_length,
            batch_size=batch_size,
            device=device,
            cache=not no_cache,
            on_subject=advance,
        )
    output.data(found.to_dict(), *evaluation_view(found))


def evaluation_view(found: "Evaluation") -> "list[RenderableType]":
    """One line a subject, a column a task."""
    from lora_merge.cli.shared.output import percent, table
    from lora_merge.evaluation.bench import ALL

    rated = any(line.normalised is not None for line in found.lines)
    tasks = found.tasks if len(found.tasks) <= 6 else ()  # what fits; --json has them all
    grid = table(found.metric, *tasks, ALL, *(["of own"] if rated else []))
    is_share = found.higher and found.metric in ("accuracy", "exact-match")
    for line in found.lines:
        cells = [line.scores[task] for task in (*tasks, ALL)]
        shown = [percent(cell) if is_share else f"{cell:.4g}" for cell in cells]
        grid.add_row(line.name, *shown, *([percent(line.normalised)] if rated else []))
    better = "more" if found.higher else "less"
    return [grid, f"{found.rows} rows; {better} is better"]
