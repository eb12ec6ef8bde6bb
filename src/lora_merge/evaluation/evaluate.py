"""Score adapters, merges and mixtures on rows, side by side."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lora_merge.arguments import takes
from lora_merge.evaluation.bench import Subject, open_bench, open_subjects
from lora_merge.evaluation.options import Evaluate
from lora_merge.evaluation.rows import ALL
from lora_merge.evaluation.score_cache import cached, keep
from lora_merge.planning import counted
from lora_merge.printing import Report, Summary


@dataclass(frozen=True)
class Score:
    """One line of the table.

    Attributes:
        name: The base, an adapter or a mixture.
        kind: Which of these it is.
        scores: Task → score; `all` is over all rows.
        normalised: Mean over the tasks of this score over that of the task's own adapter (the other
            way round where less is better), so that 1 is as good as each on its own; None where
            no task has an adapter of its name.
    """

    name: str
    kind: Literal["base", "adapter", "mixture"]
    scores: dict[str, float]
    normalised: float | None = None


@dataclass(frozen=True, repr=False)
class Evaluation(Report):
    """What was measured.

    Attributes:
        metric: Its name.
        higher: Whether more is better.
        num_rows: How many rows.
        tasks: Names of the tasks in the rows.
        lines: The base first, then what was asked for, in that order.
    """

    metric: str
    higher: bool
    num_rows: int
    tasks: tuple[str, ...]
    lines: tuple[Score, ...]

    def summary(self) -> Summary:
        """Every line's score over all rows."""
        facts = [(line.name, f"{line.scores[ALL]:.4g}") for line in self.lines[:16]]
        if len(self.lines) > len(facts):
            facts.append(("and", f"{len(self.lines) - len(facts)} lines more"))
        better = "more" if self.higher else "less"
        return Summary(f"{self.metric} on {self.num_rows} rows ({better} is better)", tuple(facts))

    def rows(self) -> list[dict[str, Any]]:
        """One row per line, a column per task."""
        return [
            {"name": one.name, "kind": one.kind, **one.scores, "normalised": one.normalised}
            for one in self.lines
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "schema": 1,
            "metric": self.metric,
            "higher": self.higher,
            "rows": self.num_rows,
            "tasks": list(self.tasks),
            "lines": [asdict(line) for line in self.lines],
        }


@takes(Evaluate)
def evaluate(given: Evaluate) -> Evaluation:
    """Score the base model, adapters, merges and mixtures on rows.

    Returns:
        The table; its first line is the base model.

    Raises:
        LoraMergeError: If rows, model and subjects do not fit together.

    Examples:
        >>> import lora_merge
        >>> found = lora_merge.evaluate("examples/adapters/*", base="examples/base",
        ...                             data="examples/data/test.jsonl", cache=False)
        >>> [round(line.scores["upper"], 2) for line in found.lines]
        [0.0, 0.0, 0.0, 1.0]
    """
    opened = open_subjects(given.subjects)
    bench, base = open_bench(given), os.fspath(given.base)
    step = counted(given.progress, "evaluating", len(opened) + 1)
    lines = []
    for subject in (Subject("base", "base"), *opened):
        known = given.cache and isinstance(given.metric, str)
        scores = cached(bench, base, subject) if known else None
        if scores is None:
            scores = bench.score(subject.what)
            if known:
                keep(bench, base, subject, scores)
        lines.append(Score(subject.name, subject.kind, scores))
        step()
    higher, tasks = bench.metric.higher, tuple(bench.rows.tasks)
    lines = normalised(lines, tasks, higher=higher)
    return Evaluation(bench.metric.name, higher, len(bench.rows.rows), tasks, tuple(lines))


def normalised(lines: Sequence[Score], tasks: Sequence[str], *, higher: bool) -> list[Score]:
    """The lines with their scores over those of each task's own adapter.

    An adapter is a task's own if it is called like it, less its folder.
    """
    own = {Path(line.name).name: line.scores for line in lines if line.kind == "adapter"}
    known = [task for task in tasks if task in own and own[task][task] > 0]

    def share(line: Score) -> float | None:
        if not known or not (higher or all(line.scores[task] > 0 for task in known)):
            return None
        parts = [line.scores[task] / own[task][task] for task in known]
        return sum(part if higher else 1 / part for part in parts) / len(parts)

    return [replace(line, normalised=share(line)) for line in lines]
