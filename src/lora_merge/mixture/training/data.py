"""Training data for a gate: JSON lines with `text`, `prompt` and `response`, or `parts`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_merge.errors import LoraMergeError, SourceError
from lora_merge.files.documents import parse_json
from lora_merge.files.lines import read_lines

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
        owners: Expert of each token or -1, for rows that change their task; empty: `expert`.
    """

    ids: tuple[int, ...]
    skipped: int
    expert: int
    owners: tuple[int, ...] = ()

    @property
    def is_labelled(self) -> bool:
        """Whether any of its tokens has an expert."""
        return max(self.owners, default=self.expert) >= 0


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
        owners: Expert of each token or -1, int64, shape (B, S).
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    owners: Tensor

    @property
    def num_targets(self) -> int:
        """Tokens that carry a loss."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def counts(self) -> Tensor:
        """Tokens that carry a loss, that name their expert, and all; int64, shape (3,)."""
        return torch.stack(
            [(self.labels[:, 1:] != IGNORED).sum(), (self.owners >= 0).sum(), self.mask.sum()]
        )

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*(t.to(device) for t in (self.ids, self.mask, self.labels, self.owners)))


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
        experts: Names that an `expert` field may have.
        max_length: Longer rows are cut.
        strict: Refuse the file if any row is bad; otherwise bad rows are listed and left out.

    Raises:
        DataError: If the file cannot be read, has no usable row, or `strict` and a bad one.
    """
    examples, faults = [], []
    for number, line in enumerate(read_lines(path, error=DataError).texts, start=1):
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
        row = parse_json(line, "it")
    except SourceError as error:
        raise ValueError(error.message) from error
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    expert = _expert_of(row, experts)
    skipped = 0
    owners: list[int] = []
    if isinstance(row.get("text"), str):
        ids = _tokens(tokenizer, row["text"], first=True)
    elif isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        ids = _tokens(tokenizer, row["prompt"], first=True)
        skipped = len(ids)
        ids += _tokens(tokenizer, row["response"], first=False)
    elif isinstance(row.get("parts"), list):
        ids, owners = _parts(row["parts"], tokenizer, experts)
    else:
        raise ValueError("neither text, nor prompt and response, nor parts")
    if getattr(tokenizer, "eos_token_id", None) is not None and ids[-1:] != [
        tokenizer.eos_token_id
    ]:
        ids.append(tokenizer.eos_token_id)
        owners += owners[-1:]
    ids, owners = ids[:max_length], owners[:max_length]
    if len(ids) <= max(skipped, 1):
        raise ValueError("no token left to learn from")
    return Example(tuple(ids), skipped, expert, tuple(owners))


def _parts(
    parts: Sequence[Any], tokenizer: Any, experts: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Tokens and owners of a row that changes its task."""
    ids: list[int] = []
    owners: list[int] = []
    for number, part in enumerate(parts, start=1):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(f"part {number} has no text")
        found = _tokens(tokenizer, part["text"], first=number == 1)
        ids += found
        owners += [_expert_of(part, experts)] * len(found)
    return ids, owners


def _tokens(tokenizer: Any, text: str, *, first: bool) -> list[int]:
    """Token ids; only the first piece of a row gets what the tokenizer puts before a text."""
    return token_ids(tokenizer, text, special=first)


def token_ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """A text's tokens, with or without what the tokenizer puts around a text.

    Raises:
        ValueError: If it cannot be called; a damaged one raises anything.
    """
    try:
        return [int(one) for one in tokenizer(text, add_special_tokens=special)["input_ids"]]
    except Exception as error:
        raise ValueError(f"the tokenizer fails: {type(error).__name__}: {error}") from error


def _expert_of(row: Mapping[str, Any], experts: Sequence[str]) -> int:
    """Index of the expert that a row or part names, -1 if it names none."""
    name = row.get("expert")
    if name is None:
        return -1
    if name not in experts:
        some = ", ".join(experts[:12]) + (", …" if len(experts) > 12 else "")
        raise ValueError(f"no expert is called {name!r}; they are {some or 'without names here'}")
    return list(experts).index(name)


def collate(examples: Sequence[Example], pad: int = 0) -> Batch:
    """Pad rows on the right and stack them."""
    width = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), width), pad)
    mask = torch.zeros(len(examples), width, dtype=torch.int64)
    labels = torch.full((len(examples), width), IGNORED)
    owners = torch.full((len(examples), width), -1)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size] = torch.tensor(example.ids)
        mask[row, :size] = 1
        labels[row, example.skipped : size] = ids[row, example.skipped : size]
        owners[row, :size] = torch.tensor(example.owners or example.expert)
    return Batch(ids, mask, labels, owners)


def batches(
    examples: Sequence[Example], size: int, *, seed: int, start: int = 0, rank: int = 0, of: int = 1
) -> Iterator[Batch]:
    """Endless shuffled batches; number `start` of them is the same whoever asks.

    Every epoch has an order of its own, drawn from the seed and the epoch's number: a resumed run
    sees exactly the rows it would have seen, and of several processes each takes its share (every
    `of`-th row from `rank` on) of the batch that one process would have seen.
    """
    per_epoch = max(len(examples) // size, 1)
    number = start
    while True:
        epoch, place = divmod(number, per_epoch)
        random = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(examples), generator=random).tolist()
        chosen = order[place * size : (place + 1) * size][rank::of]
        yield collate([examples[i] for i in chosen])
        number += 1


def in_order(examples: Sequence[Example], size: int) -> Iterator[Batch]:
    """Batches for evaluation."""
    for start in range(0, len(examples), size):
        yield collate(examples[start : start + size])
