"""What a tuner's config says, and the tensors that all its modules share."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.dialects.dialect import Header
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.errors import AdapterError


@dataclass(frozen=True)
class Settings:
    """What holds for every module of a file.

    Attributes:
        header: The file.
        config: Its config.
        shared: Tensors that stand outside the modules: part ("vera_A") → name in the file.
        modules: How many modules there are.
    """

    header: Header
    config: AdapterConfig
    shared: Mapping[str, str]
    modules: int

    def said(self, field: str, default: Any = None) -> Any:
        """A field of the config as stored."""
        value = self.config.raw.get(field)
        return default if value is None else value

    def scaling(self, module: str, field: str = "alpha", default: float = 8) -> float:
        """Alpha / r as the config and its patterns have it for a module."""
        config = replace(self.config, lora_alpha=float(self.said(field, default)))
        rank = config.rank_of(module)
        if rank is None or rank < 1:
            self.refuse(f"r is {rank}", "correct adapter_config.json")
        return config.scaling_of(module, rank)

    def key(self, part: str, remedy: str) -> str:
        """Name of a shared tensor.

        Raises:
            AdapterError: If it is not in the file.
        """
        if part not in self.shared:
            self.refuse(f"{part} is not in the file", remedy)
        return self.shared[part]

    def base_shape(self, group: Group) -> tuple[int, int]:
        """(d_out, d_in) of a module's weight, which this tuner does not store.

        Raises:
            AdapterError: Without a base model, or if it has no such weight.
        """
        shape = self.header.base_shape(group.module)
        if shape is None:
            group.refuse(
                "the width of this module is not stored",
                "name the base model, whose headers tell it: lora-merge convert --base DIR",
            )
        if len(shape) != 2:
            group.refuse(f"the base weight has shape {list(shape)}", "leave this module out")
        return (shape[1], shape[0]) if self.config.fan_in_fan_out else (shape[0], shape[1])

    def refuse(self, why: str, remedy: str) -> NoReturn:
        """Refuse the whole file.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(f"{self.header.adapter}: {self.config.peft_type}: {why}", remedy)
