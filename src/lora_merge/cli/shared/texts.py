"""What commands share that read rows: the argument, and telling which rows were left out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lora_merge.cli.shared.output import Output
    from lora_merge.mixture.training.data import Dataset

mixture_argument = click.argument("mixture", type=click.Path(path_type=Path))
_MOST = 5  # faults that are shown


def words(_: Any, __: Any, value: str | None) -> tuple[str, ...]:
    """Words between commas, for click."""
    return tuple(word.strip() for word in value.split(",") if word.strip()) if value else ()


class Rows:
    """The rows that a function reads, shown as they are read: `on_data`.

    Attributes:
        count: How many can be used, of the first data.
        faults: What is wrong with the others.
    """

    def __init__(self, output: "Output") -> None:
        self.output = output
        self.count: int | None = None
        self.faults: list[str] = []

    def __call__(self, data: "Dataset") -> None:
        """Take what was read."""
        if self.count is None:
            self.count = len(data.examples)
        for fault in data.faults[:_MOST]:
            self.output.note(f"left out: {fault}")
        if len(data.faults) > _MOST:
            self.output.note(f"{len(data.faults)} of the rows were left out")
        self.faults += data.faults
