"""What is measured of a model on rows: loss, accuracy, exact match, or what a command says."""

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.errors import LoraMergeError, MethodError
from lora_merge.evaluation.rows import Kind, Padded, Row, Rows, padded
from lora_merge.mixture.training.data import IGNORED

COMMAND = "command:"
_NEW_TOKENS = 32
_TEXTUAL: tuple[Kind, ...] = ("response", "choices")
Losses = dict[tuple[int, int], tuple[float, int]]


class MetricError(LoraMergeError):
    """A metric that cannot be computed on these rows."""


@dataclass(frozen=True)
class RowScores:
    """A score of every row: `values[i] / weights[i]`; of several rows, the quotient of the sums.

    Attributes:
        values: Summed loss, or number of right answers.
        weights: Tokens, or 1.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...]

    def mean(self, indices: Sequence[int]) -> float:
        """Score of some rows together."""
        return sum(self.values[i] for i in indices) / sum(self.weights[i] for i in indices)


@dataclass(frozen=True)
class Metric:
    """One way to score rows.

    Attributes:
        name: What users call it.
        kinds: Rows it can be computed on.
        higher: Whether more is better.
        summary: What it is, in words.
        score: (model, tokenizer, rows, batch size) → scores.
    """

    name: str
    kinds: tuple[Kind, ...]
    higher: bool
    summary: str
    score: Callable[[nn.Module, Any, Rows, int], RowScores]


def find_metric(name: str | Callable[[list[dict[str, str]]], float], rows: Rows) -> Metric:
    """A metric by name, a command, or a Python function.

    Args:
        name: "loss", "accuracy", "exact-match", "auto" (accuracy where rows have choices or labels,
            exact match where they have responses, else loss), "command:PROGRAM ...", which gets
            JSON lines {prompt, response, output} on standard input and prints a number (more is
            better), or a function of a list of such mappings.
        rows: What it will be computed on.

    Raises:
        MethodError: If there is no such metric.
        MetricError: If it cannot be computed on these rows.
    """
    if callable(name):
        title = getattr(name, "__name__", "function")
        metric = Metric(title, _TEXTUAL, True, "what a function says", _generated(name))
    elif name.startswith(COMMAND):
        judge = _generated(_command(name))
        metric = Metric(name, _TEXTUAL, True, "what a program says", judge)
    else:
        by_kind = {"text": "loss", "response": "exact-match"}
        chosen = by_kind.get(rows.kind, "accuracy") if name == "auto" else name
        if chosen not in METRICS:
            known = ", ".join(["auto", *METRICS])
            raise MethodError(f"no metric {name!r}", f"it is one of {known}, or {COMMAND}PROGRAM")
        metric = METRICS[chosen]
    if rows.kind not in metric.kinds:
        fitting = [m.name for m in METRICS.values() if rows.kind in m.kinds]
        raise MetricError(
            f"{metric.name} cannot be computed on rows of {rows.kind}",
            f"use {' or '.join(fitting)}",
        )
    return metric


def _logits(model: nn.Module, batch: Padded) -> tuple[Tensor, Tensor]:
    """(logits, labels) of the next tokens, float32, shapes (B, S - 1, V) and (B, S - 1)."""
    labels = batch.labels[:, 1:]
    logits = _said(model, batch, use_cache=False)[:, :-1].float()
    _refuse_nonsense(logits.amax(-1)[batch.mask[:, 1:].bool().to(logits.device)])
    return logits, labels.to(logits.device)


def _said(model: Any, batch: Padded, **how: bool) -> Tensor:
    """A model's logits."""
    device = next(model.parameters()).device
    ids, mask = batch.ids.to(device), batch.mask.to(device)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, **how).logits
    return logits


def _refuse_nonsense(largest: Tensor) -> None:
    """Refuse what overflowed, by its largest logits: the likeliest is whichever comes first."""
    if not bool(torch.isfinite(largest).all()):
        raise MetricError(
            "the model's logits are NaN or infinite", "leave it out, or give it a smaller scale"
        )


@torch.no_grad()
def _losses(model: nn.Module, rows: Rows, batch_size: int) -> Losses:
    """(row, option) → summed negative log likelihood in nats, and the tokens it is over."""
    found: Losses = {}
    for batch in padded(rows.rows, batch_size):
        logits, labels = _logits(model, batch)
        losses = nn.functional.cross_entropy(
            logits.mT, labels, ignore_index=IGNORED, reduction="none"
        )
        sums, counts = losses.double().sum(1).tolist(), (labels != IGNORED).sum(1).tolist()
        found |= dict(zip(batch.places, zip(sums, counts, strict=True), strict=True))
    return found


def _loss(model: nn.Module, _: Any, rows: Rows, batch_size: int) -> RowScores:
    found = _losses(model, rows, batch_size)
    wanted = [row.answer if row.kind == "choices" else 0 for row in rows.rows]
    pairs = [found[place] for place in enumerate(wanted)]
    return RowScores(tuple(p[0] for p in pairs), tuple(float(p[1]) for p in pairs))


@torch.no_grad()
def _exact(model: nn.Module, _: Any, rows: Rows, batch_size: int) -> RowScores:
    """Greedy decoding gives the response exactly if every token of it is the likeliest next one."""
    right = [0.0] * len(rows.rows)
    for batch in padded(rows.rows, batch_size):
        logits, labels = _logits(model, batch)
        hits = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1).tolist()
        for (row, _option), hit in zip(batch.places, hits, strict=True):
            right[row] = float(hit)
    return RowScores(tuple(right), (1.0,) * len(right))


def _accuracy(model: nn.Module, _: Any, rows: Rows, batch_size: int) -> RowScores:
    if rows.kind == "label":
        return _label_accuracy(model, rows, batch_size)
    found = _losses(model, rows, batch_size)
    right = []
    for i, row in enumerate(rows.rows):
        losses = [found[i, option][0] for option in range(len(row.options))]
        right.append(float(losses.index(min(losses)) == row.answer))
    return RowScores(tuple(right), (1.0,) * len(right))


@torch.no_grad()
def _label_accuracy(model: nn.Module, rows: Rows, batch_size: int) -> RowScores:
    right = [0.0] * len(rows.rows)
    for batch in padded(rows.rows, batch_size):
        logits = _said(model, batch)
        _refuse_nonsense(logits.amax(-1))
        for (row, _option), guess in zip(batch.places, logits.argmax(-1).tolist(), strict=True):
            right[row] = float(guess == rows.rows[row].answer)
    return RowScores(tuple(right), (1.0,) * len(right))


METRICS = {
    metric.name: metric
    for metric in (
        Metric("loss", ("text", "response", "choices"), False, "nats per token", _loss),
        Metric("exact-match", ("response",), True, "whole response, decoded greedily", _exact),
        Metric("accuracy", ("choices", "label"), True, "likeliest choice or label", _accuracy),
    )
}


def _generated(judge: Callable[[list[dict[str, str]]], float]) -> Callable[..., RowScores]:
    """A metric of what the model generates; it judges all rows of a task at once."""

    def score(model: nn.Module, tokenizer: Any, rows: Rows, batch_size: int) -> RowScores:
        outputs = _generate(model, tokenizer, rows.rows, batch_size)
        values = [0.0] * len(rows.rows)
        for task in rows.tasks or [""]:
            members = [i for i, row in enumerate(rows.rows) if row.task == task]
            said = [
                {"prompt": row.prompt, "response": row.response, "output": outputs[i]}
                for i, row in enumerate(rows.rows)
                if row.task == task
            ]
            value = float(judge(said))
            if not isfinite(value):
                raise MetricError(f"the metric gave {value}", "it has to give a finite number")
            for i in members:
                values[i] = value
        return RowScores(tuple(values), (1.0,) * len(values))

    return score


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int) -> list[str]:
    """What the model says after each prompt, greedily, up to its end token."""
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: -rows[i].skipped[0])
    outputs = [""] * len(rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        prompts = [rows[i].options[0][: rows[i].skipped[0]] for i in part]
        width = max(map(len, prompts))
        ids = torch.full((len(part), width), pad)
        mask = torch.zeros(len(part), width, dtype=torch.int64)
        for place, prompt in enumerate(prompts):  # padded on the left: all end together
            ids[place, width - len(prompt) :] = torch.tensor(prompt)
            mask[place, width - len(prompt) :] = 1
        made = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(_NEW_TOKENS, *(len(rows[i].options[0]) for i in part)),
            do_sample=False,
            pad_token_id=pad,
        )
        for place, i in enumerate(part):
            outputs[i] = tokenizer.decode(made[place, width:], skip_special_tokens=True)
    return outputs


def _command(name: str) -> Callable[[list[dict[str, str]]], float]:
    """A user's program as a metric: JSON lines in, a number out."""
    program = name.removeprefix(COMMAND).strip()
    if not program:
        raise MethodError("no program to score with", f"write {COMMAND}python score.py")

    def judge(said: list[dict[str, str]]) -> float:
        lines = "".join(json.dumps(row) + "\n" for row in said)
        done = subprocess.run(program, shell=True, input=lines, capture_output=True, text=True)
        words = done.stdout.split()
        if done.returncode or not words:
            told = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            raise MetricError(f"{program!r} failed: {told}", "run it by hand on a few lines")
        try:
            return float(words[-1])
        except ValueError as error:
            raise MetricError(
                f"{program!r} printed {words[-1]!r}, no number", "its last word is the score"
            ) from error

    return judge
