"""What a tuner's config says, and the tensors that all its modules share."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.dialects.dialect import Header
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.errors import AdapterError
from lora_merge.files.documents import validated


@dataclass(frozen=True)
class BlockDiagonal:
    """BD-LoRA's `use_bdlora`."""

    nblocks: int = 1
    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None


@dataclass(frozen=True)
class Fields:
    """What the tuners' configs say beside what LoRA's says, by PEFT's names."""

    r: int | None = None
    alpha: float | None = None
    scaling: float | None = None
    init_weights: bool | str | None = None
    use_bdlora: BlockDiagonal | None = None
    qalora_group_size: int | None = None
    apply_GS: bool | None = None
    para: bool | None = None
    decomposition_method: str | None = None
    psoft_orth: bool | None = None
    psoft_svd: str | None = None
    psoft_mag_a: bool | None = None
    psoft_mag_b: bool | None = None
    ab_svd_init: str | None = None
    use_cayley_neumann: bool | None = None
    num_cayley_neumann_terms: int | None = None
    cayley_neumann_eps: float | None = None
    act_fn: str | None = None
    random_loc_seed: int | None = None
    block_share: bool | None = None
    coft: bool | None = None
    sample_at_inference: bool | None = None
    topk: int | None = None
    weight_tying: float | None = None
    projection_seed: int | None = None
    variant: str | None = None
    group_size: int | None = None
    randlora_alpha: float | None = None
    wavelet_family: str | None = None
    use_idwt: bool | None = None
    paca_alpha: float | None = None


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
        """A field of the config, of its type.

        Raises:
            AdapterError: If the config has something else there.
        """
        value = self._fields[field]
        return default if value is None else value

    @cached_property
    def _fields(self) -> dict[str, Any]:
        what = f"{self.header.adapter}: adapter_config.json has a field of the wrong type"
        raw = dict(self.config.raw)
        return vars(validated(Fields, raw, what, "repair it", error=AdapterError))

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
                "name the base model, whose headers tell it: --base DIR",
            )
        if len(shape) != 2:
            group.refuse(f"the base weight has shape {list(shape)}", "leave this module out")
        return (shape[1], shape[0]) if self.config.fan_in_fan_out else (shape[0], shape[1])

    def refuse_bias(self, group: Group, why: str) -> None:
        """Refuse a module that has a bias in the base, where the tuner changes that, too.

        Raises:
            AdapterError: A LoRA has no place for it.
        """
        if self.header.base is not None and self.header.base.has_bias(group.module):
            group.refuse(why, "merge it into its base with PEFT: a LoRA has no place for the bias")

    def refuse(self, why: str, remedy: str) -> NoReturn:
        """Refuse the whole file.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(f"{self.header.adapter}: {self.config.peft_type}: {why}", remedy)
