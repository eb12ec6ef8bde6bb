"""Training data for a gate: JSON lines with `text`, or `prompt` and `response`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_merge.errors import LoraMergeError

IGNORED = -100  # what transformers' losses skip


class DataError(LoraMergeError):
    """Training data that cannot be used."""


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        ids: Token ids.
        skipped: How many of the first tokens carry no loss (the prompt).
        expert: Index of the expert whose task it is, -1 where the row does not say.
    """

    ids: tuple[int, ...]
    skipped: int
    expert: int


@dataclass(frozen=True)
class Dataset:
    """Rows that can be used, and what was wrong with the others.

    Attributes:
        examples: In file order.
        faults: "line N: reason" of every row that was left out.
    """

    examples: tuple[Example, ...]
    faults: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows padded on the right.

    Attributes:
        ids: int64, shape (B, S).
        mask: 1 for tokens, int64, shape (B, S).
        labels: ids, or -100 where there is no loss, shape (B, S).
        experts: Expert of each row or -1, int64, shape (B,).
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    experts: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*(t.to(device) for t in (self.ids, self.mask, self.labels, self.experts)))


def read_examples(
    path: Path,
    tokenizer: Any,
    *,
    experts: Sequence[str] = (),
    max_length: int = 1024,
    strict: bool = False,
) -> Dataset:
    """Read a JSON-lines file.

    Args:
        path: The file.
        tokenizer: Called as transformers' tokenizers are.
        experts: Names that the `expert` field may have.
        max_length: Longer rows are cut.
        strict: Refuse the file if any row is bad; otherwise bad rows are listed and left out.

    Raises:
        DataError: If the file cannot be read, has no usable row, or `strict` and a bad one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", "give a UTF-8 JSON-lines file"
        ) from error
    examples, faults = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            examples.append(_parse(line, tokenizer, experts, max_length))
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    if faults and strict:
        shown = "\n  ".join(faults[:8])
        raise DataError(f"{path}: {len(faults)} bad rows:\n  {shown}", "repair them")
    if not examples:
        detail = f" ({faults[0]})" if faults else ""
        raise DataError(f"{path} has no usable row{detail}", 'rows look like {"text": "..."}')
    return Dataset(tuple(examples), tuple(faults))


def _parse(line: str, tokenizer: Any, experts: Sequence[str], max_length: int) -> Example:
    """One row; raises ValueError with what is wrong."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    expert = -1
    if row.get("expert") is not None:
        if row["expert"] not in experts:
            raise ValueError(f"no expert is called {row['expert']!r}")
        expert = list(experts).index(row["expert"])
    if isinstance(row.get("text"), str):
        ids, skipped = list(tokenizer(row["text"])["input_ids"]), 0
    elif isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        before = list(tokenizer(row["prompt"])["input_ids"])
        after = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        ids, skipped = before + list(after), len(before)
    else:
        raise ValueError("neither text nor prompt and response")
    if getattr(tokenizer, "eos_token_id", None) is not None and ids[-1:] != [
        tokenizer.eos_token_id
    ]:
        ids.append(tokenizer.eos_token_id)
    ids = ids[:max_length]
    if len(ids) <= max(skipped, 1):
        raise ValueError("no token left to learn from")
    return Example(tuple(ids), skipped, expert)


def collate(examples: Sequence[Example], pad: int = 0) -> Batch:
    """Pad rows on the right and stack them."""
    width = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), width), pad)
    mask = torch.zeros(len(examples), width, dtype=torch.int64)
    labels = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size] = torch.tensor(example.ids)
        mask[row, :size] = 1
        labels[row, example.skipped : size] = ids[row, example.skipped : size]
    return Batch(ids, mask, labels, torch.tensor([e.expert for e in examples]))


def batches(
    examples: Sequence[Example], size: int, *, seed: int, start: int = 0
) -> Iterator[Batch]:
    """Endless shuffled batches; number `start` of them is the same whoever asks.

    Every epoch has an order of its own, drawn from the seed and the epoch's number: a resumed run
    sees exactly the rows it would have seen.
    """
    per_epoch = max(len(examples) // size, 1)
    number = start
    while True:
        epoch, place = divmod(number, per_epoch)
        random = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(examples), generator=random).tolist()
        chosen = order[place * size : (place + 1) * size]
        yield collate([examples[i] for i in chosen])
        number += 1


def in_order(examples: Sequence[Example], size: int) -> Iterator[Batch]:
    """Batches for evaluation."""
    for start in range(0, len(examples), size):
        yield collate(examples[start : start + size])
