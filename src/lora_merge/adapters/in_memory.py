"""Adapters that are made in memory instead of written to files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.config import parse_config
from lora_merge.adapters.writer import OutputPlan, TensorWriter, Writer, save_output
from lora_merge.files.tensor_file import TensorDict
from lora_merge.printing import Printed, Summary

R = TypeVar("R", bound=Printed)


class MemoryWriter(TensorWriter):
    """Collects an adapter in memory.

    Args:
        plan: What will be collected.
    """

    def adapter(self, name: str) -> Adapter:
        """What was collected, once every module is there."""
        raw = self.format.config(self.plan)
        config = None if raw is None else parse_config(raw, name)
        return build_adapter(name, config, TensorDict(self.tensors))


@dataclass(frozen=True, eq=False, repr=False)
class MadeAdapter(Adapter, Generic[R]):
    """An adapter that was made, with the report of how.

    Attributes:
        report: What was done, module by module.
    """

    report: R = field(kw_only=True)

    @classmethod
    def of(cls, adapter: Adapter, report: R, **changes: Any) -> "MadeAdapter[R]":
        """An adapter and its report together; `changes` replace fields of the adapter."""
        given = {spec.name: getattr(adapter, spec.name) for spec in fields(Adapter)}
        return cls(**{**given, **changes}, report=report)

    def summary(self) -> Summary:
        """The adapter's, and its report's below."""
        mine, made = super().summary(), self.report.summary()
        return Summary(mine.title, tuple(dict.fromkeys((*mine.facts, *made.facts))))


def make(
    output: OutputPlan,
    fill: Callable[[Writer], R],
    texts: Callable[[R], Mapping[str, str]],
    *,
    out: Path | None,
    name: str,
    force: bool = False,
    inputs: Sequence[Path] = (),
) -> MadeAdapter[R]:
    """Make an adapter, in a directory or in memory, with the report of how.

    Args:
        output: What it will be.
        fill: Writes every tensor of it; returns the report.
        texts: Name → text of the files beside the tensors (card, recipe).
        out: The directory to make; None: in memory.
        name: What messages call an adapter in memory.
        force: Replace a directory that lora-merge wrote.
        inputs: Files that are read.

    Raises:
        OutputError: If the directory cannot be written; nothing is left behind.
    """
    if out is None:
        writer = MemoryWriter(output)
        report = fill(writer)
        return MadeAdapter.of(writer.adapter(name), report, texts=texts(report))
    report = save_output(out, output, fill, texts, force=force, inputs=inputs)
    return MadeAdapter.of(Adapter.from_pretrained(out), report)
