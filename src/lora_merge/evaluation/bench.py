"""A loaded base model and rows, on which many things are scored one after the other."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lora_merge.adapters.access.coerce import open_adapters
from lora_merge.adapters.adapter import Adapter
from lora_merge.evaluation.applied import applied
from lora_merge.evaluation.metrics import Metric, MetricError, RowScores, find_metric
from lora_merge.evaluation.options import BenchOptions
from lora_merge.evaluation.rows import ALL, Rows, RowsError, has_labels, read_rows
from lora_merge.files.lines import read_lines
from lora_merge.mixture.formats.directory import is_mixture
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.training.base_model import load_base


@dataclass(frozen=True, eq=False)
class Subject:
    """What is scored.

    Attributes:
        name: For tables.
        kind: The base model itself, an adapter in it, or a mixture.
        what: The adapter or mixture.
        files: Where it lies, for the cache of scores; none where it lies in memory.
    """

    name: str
    kind: Literal["base", "adapter", "mixture"]
    what: Adapter | Mixture | None = None
    files: tuple[Path, ...] = ()


@dataclass(frozen=True, eq=False)
class Bench:
    """A loaded model and rows.

    Attributes:
        model: The base model; it is the same, bit for bit, after every score.
        tokenizer: Its tokenizer.
        rows: The rows.
        metric: What is measured.
        batch_size: Texts in one pass.
    """

    model: nn.Module
    tokenizer: Any
    rows: Rows
    metric: Metric
    batch_size: int = 16

    def score(self, what: Adapter | Mixture | None) -> dict[str, float]:
        """Task → score; `all` is over all rows. None scores the base model itself.

        Raises:
            LoraMergeError: If it cannot be scored; names it.
        """
        try:
            with _inside(self.model, what):
                found = self.metric.score(self.model, self.tokenizer, self.rows, self.batch_size)
        except MetricError as error:
            name = "the mixture" if isinstance(what, Mixture) else what.name if what else "the base"
            raise MetricError(f"{name}: {error.message}", error.remedy) from error
        return by_task(self.rows, found)


def open_bench(given: BenchOptions) -> Bench:
    """Load a base model and rows.

    Raises:
        LoraMergeError: If the rows cannot be scored by the metric, or the model cannot be loaded.
    """
    lines = read_lines(Path(given.data), error=RowsError)
    model, tokenizer = load_base(os.fspath(given.base), given.device, head=has_labels(lines))
    rows = read_rows(lines, tokenizer, max_length=given.max_length)
    return Bench(model, tokenizer, rows, find_metric(given.metric, rows), given.batch_size)


def open_subjects(given: Any) -> list[Subject]:
    """Adapters and mixtures, in the order given; nothing but headers is read.

    Raises:
        LoraMergeError: If one cannot be opened.
    """
    one = isinstance(given, str | Path | Adapter | Mixture | nn.Module)
    found: list[Subject] = []
    for item in [given] if one else list(given):
        if isinstance(item, Mixture):
            found.append(Subject(f"{item.spec.preset} of {item.num_experts}", "mixture", item))
        elif isinstance(item, str | Path) and is_mixture(Path(item)):
            files = tuple(sorted(p for p in Path(item).rglob("*") if p.is_file()))
            mixture = Mixture.from_pretrained(item)
            found.append(Subject(str(item), "mixture", mixture, files))
        else:
            for adapter in open_adapters(item):
                found.append(Subject(adapter.name, "adapter", adapter, tuple(adapter.files)))
    return found


def by_task(rows: Rows, found: RowScores) -> dict[str, float]:
    """Score of all rows and of those of each task."""
    scores = {ALL: found.mean(range(len(rows.rows)))}
    for task in rows.tasks:
        scores[task] = found.mean([i for i, row in enumerate(rows.rows) if row.task == task])
    return scores


def _inside(model: nn.Module, what: Adapter | Mixture | None) -> AbstractContextManager[None]:
    if what is None:
        return nullcontext()
    return _attached(model, what) if isinstance(what, Mixture) else applied(model, what)


@contextmanager
def _attached(model: nn.Module, mixture: Mixture) -> Iterator[None]:
    handle = load_mixture(model, mixture)
    try:
        yield
    finally:
        handle.detach()
