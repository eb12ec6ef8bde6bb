"""What functions have in common that make something."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_merge.options import argument, option
from lora_merge.planning import Plan, Progress

Folder = str | os.PathLike[str]
OUT = ("-o", "--out")


@dataclass(frozen=True, kw_only=True)
class Telling:
    """How a function tells what it does."""

    progress: Progress | None = argument(
        None, "called after each step with what is done and how many steps that has"
    )


@dataclass(frozen=True, kw_only=True)
class Running(Telling):
    """How a plan is run."""

    force: bool = option(False, "replace an output that lora-merge wrote")
    jobs: int | None = argument(None, "worker threads; default: the CPUs")
    on_plan: Callable[[Plan[Any]], None] | None = argument(
        None, "called with the plan, before anything is computed"
    )
