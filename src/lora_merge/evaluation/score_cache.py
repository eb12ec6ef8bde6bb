"""Scores that were measured before: of the same files, base, rows, metric and version."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from lora_merge._version import __version__
from lora_merge.errors import OutputError
from lora_merge.evaluation.bench import Bench, Subject
from lora_merge.evaluation.rows import ALL
from lora_merge.files.atomic import atomic_file
from lora_merge.files.documents import read_cache


def cached(bench: Bench, base: str, subject: Subject) -> dict[str, float] | None:
    """Scores of an earlier run; None if there are none or the subject lies in memory."""
    path = _place(bench, base, subject)
    if path is None:
        return None
    found = read_cache(dict[str, float], path)
    wanted = {ALL, *bench.rows.tasks}
    return found if found and found.keys() == wanted else None  # damaged: measured anew


def keep(bench: Bench, base: str, subject: Subject, scores: Mapping[str, float]) -> None:
    """Remember scores for later runs; a place that cannot be written costs time, not the result."""
    path = _place(bench, base, subject)
    if path is None:
        return
    with contextlib.suppress(OSError, OutputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as staging:
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
