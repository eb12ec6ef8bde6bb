"""Scores that were measured before: of the same files, base, rows, metric and version."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from lora_merge._version import __version__
from lora_merge.evaluation.bench import Bench, Subject
from lora_merge.files.atomic import atomic_file


def cached(bench: Bench, base: str, subject: Subject) -> dict[str, float] | None:
    """Scores of an earlier run; None if there are none or the subject lies in memory."""
    path = _place(bench, base, subject)
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(task): float(score) for task, score in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None  # damaged: measured anew


def keep(bench: Bench, base: str, subject: Subject, scores: Mapping[str, float]) -> None:
    """Remember scores for later runs."""
    path = _place(bench, base, subject)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, "set XDG_CACHE_HOME to a writable place") as staging:
            staging.write_text(json.dumps(dict(scores)), encoding="utf-8")


def _place(bench: Bench, base: str, subject: Subject) -> Path | None:
    folder = Path(base)
    if (subject.kind != "base" and not subject.files) or not folder.is_dir():
        return None  # what a Hub id stands for may change
    content = hashlib.sha256()
    device = next(bench.model.parameters()).device.type
    for word in (__version__, bench.rows.sha256, str(bench.batch_size), bench.metric.name, device):
        content.update(word.encode() + b"\0")
    for path in (*sorted(p for p in folder.iterdir() if p.is_file()), *subject.files):
        about = path.stat()
        content.update(f"{path.resolve()} {about.st_size} {about.st_mtime_ns}\0".encode())
    return score_directory() / f"{content.hexdigest()}.json"


def score_directory() -> Path:
    """Where scores are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lora-merge" / "scores"
