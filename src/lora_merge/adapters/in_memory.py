"""Adapters that are made in memory instead of written to files."""

from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.config import parse_config
from lora_merge.adapters.writer import TensorWriter
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
