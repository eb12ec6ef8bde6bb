"""Rows to score a model on: JSON lines of text, prompt and response, choices, or labels."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lora_merge.errors import LoraMergeError
from lora_merge.files.documents import parse_json
from lora_merge.files.lines import Lines
from lora_merge.mixture.training.data import IGNORED, token_ids

Kind = Literal["text", "response", "choices", "label"]
ALL = "all"  # the name of all tasks together, in scores
_SHAPES = '{"text": ...}, {"prompt": ..., "response": ...}, {"prompt": ..., "choices": [...], '
_SHAPES += '"answer": 0} or {"text": ..., "label": 0}'


class RowsError(LoraMergeError):
    """Rows that cannot be scored."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        kind: What it asks for.
        task: Which task it belongs to (`task`, else `expert`), for tables; "" where it says none.
        options: Token ids of every text that is scored: one, or one for each choice.
        skipped: How many first tokens of each option carry no loss.
        answer: Index of the right choice, or of the right label.
        prompt: The prompt as text, for metrics that read what is generated.
        response: The right response as text.
    """

    kind: Kind
    task: str
    options: tuple[tuple[int, ...], ...]
    skipped: tuple[int, ...]
    answer: int = 0
    prompt: str = ""
    response: str = ""


@dataclass(frozen=True)
class Rows:
    """All rows of a file.

    Attributes:
        rows: In file order, all of one kind.
        sha256: Of the file.
    """

    rows: tuple[Row, ...]
    sha256: str

    @property
    def kind(self) -> Kind:
        """What they ask for."""
        return self.rows[0].kind

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks in the rows, sorted; none where no row names one."""
        return sorted({row.task for row in self.rows} - {""})

    def split(self, held_out: float, seed: int = 0) -> "tuple[Rows, Rows]":
        """Rows to choose on and rows to report, by a hash of each row's place and the seed.

        The share is kept in every task: a task with one row alone stays with those to choose on.
        """
        order = sorted(range(len(self.rows)), key=lambda i: _shuffled(seed, i))
        kept: set[int] = set()
        for task in [*self.tasks, ""]:
            members = [i for i in order if self.rows[i].task == task]
            kept |= set(members[: round(held_out * len(members))])
        parts = [
            [row for i, row in enumerate(self.rows) if (i in kept) is out] for out in (False, True)
        ]
        if not all(parts):
            raise RowsError(
                f"{len(self.rows)} rows cannot be split at {held_out:g}", "give more rows"
            )
        return Rows(tuple(parts[0]), self.sha256), Rows(tuple(parts[1]), self.sha256)


def _shuffled(seed: int, index: int) -> bytes:
    return hashlib.sha256(f"{seed}.{index}".encode()).digest()


@dataclass(frozen=True, eq=False)
class Padded:
    """Texts of several rows side by side.

    Attributes:
        ids: int64, shape (B, S), padded on the right.
        mask: 1 for tokens, int64, shape (B, S).
        labels: ids, or -100 where there is no loss, shape (B, S).
        places: (row, option) of each of the B texts.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    places: tuple[tuple[int, int], ...]


def read_rows(lines: Lines, tokenizer: Any, *, max_length: int = 1024) -> Rows:
    """Rows of JSON lines.

    Args:
        lines: From `read_lines`.
        tokenizer: Called as transformers' tokenizers are.
        max_length: A longer row is refused: cut, it would ask for something else.

    Raises:
        RowsError: If a row is none of the known shapes; names the line.
    """
    rows = []
    for number, line in enumerate(lines.texts, start=1):
        if line.strip():
            where = f"{lines.path}, line {number}"
            data = parse_json(line, where, error=RowsError)
            try:
                row = _parse(data, tokenizer)
            except (ValueError, RecursionError) as error:
                raise RowsError(f"{where}: {error}", f"rows are {_SHAPES}") from error
            longest = max(map(len, row.options))
            if longest > max_length:
                raise RowsError(
                    f"{where}: {longest} tokens, more than {max_length}",
                    "raise --max-length, or shorten the row",
                )
            rows.append(row)
    kinds = sorted({row.kind for row in rows})
    if not rows:
        raise RowsError(f"{lines.path} has no rows", f"rows are {_SHAPES}")
    if len(kinds) > 1:
        raise RowsError(
            f"{lines.path} mixes rows of {' and '.join(kinds)}", "one kind of row per file"
        )
    return Rows(tuple(rows), lines.sha256)


def has_labels(lines: Lines) -> bool:
    """Whether the first row asks for a label, which takes a model with a head."""
    first = next((line for line in lines.texts if line.strip()), "{}")
    try:
        row = parse_json(first, str(lines.path), error=RowsError)
    except RowsError:
        return False  # `read_rows` tells
    return isinstance(row, dict) and "label" in row and isinstance(row.get("text"), str)


def _parse(row: Any, tokenizer: Any) -> Row:
    """One row; raises ValueError with what is wrong."""
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    task = row.get("task", row.get("expert", ""))
    if not isinstance(task, str):
        raise ValueError(f"its task is {task!r}, no name")
    if task == ALL:
        raise ValueError(f"its task is called {ALL!r}, which stands for all rows together")
    text, prompt, response = row.get("text"), row.get("prompt"), row.get("response")
    if isinstance(text, str) and "label" in row:
        return Row("label", task, (_ids(tokenizer, text),), (0,), _index(row["label"], None))
    if isinstance(text, str):
        ids = _ended(tokenizer, _ids(tokenizer, text))
        return Row("text", task, (ids,), (1,))
    if not isinstance(prompt, str):
        raise ValueError("neither text nor prompt")
    head = _ids(tokenizer, prompt)
    if isinstance(response, str):
        ids = _ended(tokenizer, head + _ids(tokenizer, response, first=False))
        return Row("response", task, (ids,), (len(head),), prompt=prompt, response=response)
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise ValueError("neither a response nor a list of choices")
    answer = _index(row.get("answer"), len(choices))
    options = tuple(head + _ids(tokenizer, choice, first=False) for choice in choices)
    if any(len(option) == len(head) for option in options):
        raise ValueError("a choice without a token")
    skipped = (len(head),) * len(options)
    return Row("choices", task, options, skipped, answer, prompt, choices[answer])


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _index(value: Any, count: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no index")
    if count is not None and value >= count:
        raise ValueError(f"answer {value} of {count} choices; the first is 0")
    return value


def _ids(tokenizer: Any, text: str, *, first: bool = True) -> tuple[int, ...]:
    return tuple(token_ids(tokenizer, text, special=first))


def _ended(tokenizer: Any, ids: tuple[int, ...]) -> tuple[int, ...]:
    """With the end-of-text token, which a model that was trained to stop has to say, too."""
    end = getattr(tokenizer, "eos_token_id", None)
    return ids if end is None or ids[-1:] == (end,) else (*ids, end)


def padded(rows: Sequence[Row], batch_size: int, pad: int = 0) -> Iterator[Padded]:
    """All texts of all rows in batches, the longest first so that memory is known at once."""
    texts = [(r, o, option) for r, row in enumerate(rows) for o, option in enumerate(row.options)]
    texts.sort(key=lambda text: (-len(text[2]), text[0], text[1]))
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        width = len(part[0][2])
        ids = torch.full((len(part), width), pad)
        mask = torch.zeros(len(part), width, dtype=torch.int64)
        labels = torch.full((len(part), width), IGNORED)
        for i, (r, o, option) in enumerate(part):
            ids[i, : len(option)] = torch.tensor(option)
            mask[i, : len(option)] = 1
            skipped = rows[r].skipped[o]
            labels[i, skipped : len(option)] = ids[i, skipped : len(option)]
        yield Padded(ids, mask, labels, tuple((r, o) for r, o, _ in part))
