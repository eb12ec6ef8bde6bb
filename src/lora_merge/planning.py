"""Work that is decided before it is done: one pattern for everything that makes an adapter."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from lora_merge.notebook import bar, in_notebook
from lora_merge.options import argument, option
from lora_merge.printing import Report

T = TypeVar("T", covariant=True)
# Called after each step with what is done and how many steps that has.
Progress = Callable[[str, int], None]
Folder = str | os.PathLike[str]
OUT = ("-o", "--out")


class Plan(Report, Generic[T]):
    """What would be made, checked as far as that can be done without computing it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know before the work starts."""
        return ()

    @property
    def peak_bytes(self) -> int:
        """Working memory of one worker, where it is known; 0 elsewhere."""
        return 0

    def run(
        self,
        out: Folder | None = None,
        *,
        force: bool = False,
        jobs: int | None = None,
        device: str = "auto",
        progress: Progress | None = None,
    ) -> T:
        """Do it: into a directory that appears whole or not at all, or in memory.

        Args:
            out: The directory to make; None: the result stays in memory.
            force: Replace a directory that lora-merge wrote.
            jobs: Worker threads.
            device: Where to compute, where that is not the CPU alone.
            progress: Called after each step.

        Raises:
            OutputError: If the directory cannot be written; nothing is left behind.
        """
        return self._run(How(None if out is None else Path(out), force, jobs, device, progress))

    def _run(self, how: "How") -> T:
        """What `run` does."""
        raise NotImplementedError


@dataclass(frozen=True)
class How:
    """The arguments of `Plan.run`."""

    out: Path | None
    force: bool
    jobs: int | None
    device: str
    progress: Progress | None

    @property
    def place(self) -> str | None:
        """The directory, as reports say it."""
        return None if self.out is None else str(self.out)

    def step(self, what: str, total: int) -> Callable[[], None]:
        """What to call after each of `total` steps."""
        return counted(self.progress, what, total)


def counted(progress: Progress | None, what: str, total: int) -> Callable[[], None]:
    """What to call after each of `total` steps; without `progress` a notebook shows a bar."""
    if progress is not None:
        return partial(progress, what, total)
    return bar(what, total) if in_notebook() else lambda: None


@dataclass(frozen=True, kw_only=True)
class Telling:
    """How a function tells what it does."""

    progress: Progress | None = argument(
        None,
        "called after each step with what is done and how many steps that has; "
        "without it a notebook shows a bar",
    )


@dataclass(frozen=True, kw_only=True)
class Running(Telling):
    """How a plan is run."""

    force: bool = option(False, "replace an output that lora-merge wrote")
    jobs: int | None = argument(None, "worker threads; default: the CPUs")
    on_plan: Callable[[Plan[Any]], None] | None = argument(
        None, "called with the plan, before anything is computed"
    )
