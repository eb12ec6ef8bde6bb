"""Work that is decided before it is done: one pattern for everything that makes an adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from lora_merge.printing import Report

T = TypeVar("T", covariant=True)
# Called after each step with what is done and how many steps that has.
Progress = Callable[[str, int], None]


class Plan(Report, Generic[T]):
    """What would be made, checked as far as that can be done without computing it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know before the work starts."""
        return ()

    def run(
        self,
        out: Path | None = None,
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
        raise NotImplementedError


def counted(progress: Progress | None, what: str, total: int) -> Callable[[], None]:
    """What to call after each of `total` steps."""
    return lambda: progress(what, total) if progress is not None else None
