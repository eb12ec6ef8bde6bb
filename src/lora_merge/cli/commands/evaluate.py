"""`lora-merge evaluate`: how good adapters, merges and mixtures are, on your rows."""

from typing import TYPE_CHECKING, Any

import click

from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import json_option
from lora_merge.evaluation.options import Evaluate

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
)
@click.argument("subjects", nargs=-1, required=True, metavar="ADAPTER|MIXTURE...")
@options_of(Evaluate)
@json_option
def command(subjects: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Score the base model, adapters and mixtures on the rows of DATA, side by side."""
    import lora_merge
    from lora_merge.cli.shared.api import shown_progress
    from lora_merge.cli.shared.output import Output

    output = Output(as_json)
    with shown_progress(output) as progress:
        found = lora_merge.evaluate(list(subjects), **given, progress=progress)
    output.data(found.to_dict(), *evaluation_view(found))


def evaluation_view(found: "Evaluation") -> "list[RenderableType]":
    """One line a subject, a column a task."""
    from lora_merge.cli.shared.output import percent
    from lora_merge.cli.shared.table import table
    from lora_merge.evaluation.rows import ALL

    rated = any(line.normalised is not None for line in found.lines)
    tasks = found.tasks if len(found.tasks) <= 6 else ()  # what fits; --json has them all
    grid = table(found.metric, *tasks, ALL, *(["of own"] if rated else []))
    is_share = found.higher and found.metric in ("accuracy", "exact-match")
    for line in found.lines:
        cells = [line.scores[task] for task in (*tasks, ALL)]
        shown = [percent(cell) if is_share else f"{cell:.4g}" for cell in cells]
        grid.add_row(line.name, *shown, *([percent(line.normalised)] if rated else []))
    better = "more" if found.higher else "less"
    return [grid, f"{found.num_rows} rows; {better} is better"]
