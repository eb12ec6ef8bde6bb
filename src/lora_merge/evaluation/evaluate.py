"""Score adapters, merges and mixtures on rows, side by side."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lora_merge.arguments import checked
from lora_merge.evaluation.bench import Judge, Subject, open_bench, open_subjects
from lora_merge.evaluation.score_cache import cached, keep


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


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        metric: Its name.
        higher: Whether more is better.
        rows: How many.
        tasks: Names of the tasks in the rows.
        lines: The base first, then what was asked for, in that order.
    """

    metric: str
    higher: bool
    rows: int
    tasks: tuple[str, ...]
    lines: tuple[Score, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"schema": 1, **asdict(self)}


@checked()
def evaluate(
    subjects: Any,
    *,
    base: str | Path,
    data: str | Path,
    metric: str | Judge = "auto",
    max_length: int = 1024,
    batch_size: int = 16,
    device: str = "auto",
    cache: bool = True,
    on_subject: Callable[[], None] | None = None,
) -> Evaluation:
    """Score the base model, adapters, merges and mixtures on rows.

    Args:
        subjects: Adapters (what `open_adapters` takes) and mixtures (directories or `Mixture`).
        base: The base model: a directory or a Hub id.
        data: JSON lines, see `read_rows`; a row's `task` (or `expert`) names its column.
        metric: "loss", "accuracy", "exact-match", "auto", "command:PROGRAM" or a function; see
            `find_metric`.
        max_length: Rows with more tokens are refused.
        batch_size: Texts in one pass.
        device: "auto", "cpu", "cuda", ...
        cache: Take scores of the same files, rows and metric from an earlier call.
        on_subject: Called after each subject.

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
    opened = open_subjects(subjects)
    bench = open_bench(
        base, data, metric=metric, max_length=max_length, batch_size=batch_size, device=device
    )
    lines = []
    for subject in (Subject("base", "base"), *opened):
        known = cache and isinstance(metric, str)
        scores = cached(bench, str(base), subject) if known else None
        if scores is None:
            scores = bench.score(subject.what)
            if known:
                keep(bench, str(base), subject, scores)
        lines.append(Score(subject.name, subject.kind, scores))
        if on_subject is not None:
            on_subject()
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
