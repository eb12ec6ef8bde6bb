"""A training run on disk: its checkpoint, and one JSON line per step beside it."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_merge.errors import MethodError, OutputError, SourceError
from lora_merge.files.atomic import atomic_directory, atomic_file
from lora_merge.files.documents import parse_json, validated
from lora_merge.files.targets import check_file, check_target
from lora_merge.mixture.training.settings import TrainSettings

_STATE, _METRICS = "state.pt", "metrics.jsonl"
_AFRESH = "start afresh without --resume"
_LAST = 1 << 40  # step
_FREE = ("save_every", "eval_every")  # settings that a resumed run may have otherwise


def check_work(work: Path, inputs: Sequence[Path] = (), *, resume: bool = False) -> None:
    """Refuse a directory that holds something else: a checkpoint replaces it as a whole.

    Raises:
        MethodError: If a run shall go on from a checkpoint that is damaged.
        OutputError: If it is not empty and no checkpoint.
    """
    if resume and (work / _STATE).is_file():
        _read_state(work)
    if work.is_dir() and not (work / _STATE).is_file() and any(work.iterdir()):
        raise OutputError(
            f"{work} exists and is no training checkpoint, so it is not replaced",
            "name a directory for the checkpoint alone",
        )
    check_target(work, force=True, inputs=inputs)


def save_state(
    work: Path,
    step: int,
    settings: TrainSettings,
    tensors: Sequence[Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Write a checkpoint; it appears whole or not at all."""
    state = {
        "step": step,
        "settings": asdict(settings),
        "tensors": [t.detach().cpu() for t in tensors],
        "optimizer": None if optimizer is None else optimizer.state_dict(),
    }
    with atomic_directory(work, force=True) as folder:
        buffer = io.BytesIO()  # torch's own writer does not say that a disk is full
        torch.save(state, buffer)
        (folder / _STATE).write_bytes(buffer.getbuffer())
        # Says to people what this directory is.
        (folder / "config.json").write_text(json.dumps({"lora_merge": "training checkpoint"}))


def restore_state(
    work: Path,
    settings: TrainSettings,
    tensors: Sequence[Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> int:
    """Take a checkpoint up; returns its step, 0 if there is none.

    Raises:
        MethodError: If it is damaged, or belongs to another run.
    """
    if not (work / _STATE).is_file():
        return 0
    state = _read_state(work)
    now = asdict(settings)
    changed = [k for k in now if state.settings.get(k) != now[k] and k not in _FREE]
    shapes = [tuple(t.shape) for t in state.tensors]
    if changed or shapes != [tuple(t.shape) for t in tensors]:
        what = ", ".join(changed) or "the mixture"
        raise MethodError(
            f"{work}: the checkpoint belongs to a run with other settings ({what})",
            f"give the same settings, or {_AFRESH}",
        )
    try:
        with torch.no_grad():
            for tensor, value in zip(tensors, state.tensors, strict=True):
                tensor.copy_(value)
        if optimizer is not None:
            optimizer.load_state_dict(state.optimizer or {})
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise MethodError(f"{work}: the checkpoint does not fit: {error}", _AFRESH) from error
    return state.step


@dataclass(frozen=True)
class _State:
    """A checkpoint, as `save_state` writes it."""

    step: int
    settings: dict[str, Any]
    tensors: list[Any]
    optimizer: dict[str, Any] | None

    def __post_init__(self) -> None:
        if not 0 <= self.step <= _LAST:
            raise ValueError(f"step {self.step}")
        finite = (isinstance(t, Tensor) and bool(torch.isfinite(t).all()) for t in self.tensors)
        if not all(finite):
            raise ValueError("what is no tensor, or not finite")


def _read_state(work: Path) -> _State:
    what = f"{work}: the checkpoint cannot be read"
    try:
        state = torch.load(work / _STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here, and all mean the same to the user
        raise MethodError(what, _AFRESH) from error
    return validated(_State, state, what, _AFRESH, error=MethodError)


@dataclass(frozen=True)
class _Row:
    step: int


def add_metrics(work: Path, metrics: Mapping[str, Any]) -> None:
    """Append one step's line."""
    work.parent.mkdir(parents=True, exist_ok=True)  # before the first checkpoint
    with _metrics_of(work).open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def cut_metrics(work: Path, step: int) -> None:
    """Drop what a killed run reported after its last checkpoint: it is about to happen again."""
    path = _metrics_of(work)
    if not path.is_file():
        return
    check_file(path, b'"step": ')  # somebody else's has no steps
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = validated(_Row, parse_json(line, str(path)), str(path))
        except SourceError:
            continue  # cut in the middle by the kill
        if row.step <= step:
            kept.append(line + "\n")
    with atomic_file(path) as staging:
        staging.write_text("".join(kept), encoding="utf-8")


def _metrics_of(work: Path) -> Path:
    """Beside the checkpoint, which is replaced as a whole."""
    return work.with_name(f"{work.name}.{_METRICS}")
