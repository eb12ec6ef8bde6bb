"""Variants of PEFT LoRA whose delta is low-rank all the same.

| variant | what it adds | delta |
| --- | --- | --- |
| VeLoRA | another backward pass | s B A |
| MonteCLoRA | noise on A in training | s B A, the mean |
| BD-LoRA | A or B kept as blocks | s B A, the blocks put on a diagonal |
| QA-LoRA | A acts on groups of inputs | s B A, columns repeated |
| KaSA | a diagonal, and a base without its smallest triplets | s B diag(d) A - tail of W |
| PiSSA, OLoRA | a base without B A as it was at the start | s B A - head of W |
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.dialects.dialect import Claims, Dialect, Header
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.peft_variants import VARIANTS
from lora_merge.adapters.dialects.peft_whole import whole_parameters
from lora_merge.adapters.dialects.recipes import blocks, with_base
from lora_merge.adapters.dialects.recipes.units import Units, precise, product, scaled
from lora_merge.adapters.dialects.tuners.full_rank import dora
from lora_merge.adapters.dialects.tuners.settings import BlockDiagonal, Settings
from lora_merge.adapters.dialects.tuners.sort import sort_keys
from lora_merge.adapters.forms import ExtraSpec, ModuleSpec
from lora_merge.adapters.units import BaseWeight

_FACTORS = ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True)
class Variant:
    """One variant.

    Attributes:
        title: Its name.
        module: Reads one module.
        ignored: What the names of its training state begin with.
        note: What a user should know.
    """

    title: str
    module: Callable[[Group, Settings], ModuleSpec]
    ignored: str = ""
    note: str = ""


def _plain(group: Group, settings: Settings) -> ModuleSpec:
    (r, d_in), (d_out, columns) = (group.shape(part, 2) for part in _FACTORS)
    group.check(r == columns)
    scaling = settings.config.scaling_of(group.module, r)
    return group.spec(_FACTORS, None, d_out=d_out, d_in=d_in, rank=r, scaling=scaling)


def _bdlora(group: Group, settings: Settings) -> ModuleSpec:
    """Block-diagonal A or B, by substrings of the module's own name."""
    said: BlockDiagonal = settings.said("use_bdlora", BlockDiagonal())
    count = said.nblocks
    group.check(count > 0)
    own = group.module.rpartition(".")[2]
    on_a, on_b = (
        any(pattern in own for pattern in patterns or ())
        for patterns in (said.target_modules_bd_a, said.target_modules_bd_b)
    )
    if on_a == on_b:
        return _plain(group, settings)
    (r, width), (height, columns) = (group.shape(part, 2) for part in _FACTORS)
    d_in, d_out = (width * count, height) if on_a else (width, height)
    group.check((columns == r) if on_a else (columns * count == r))
    group.check((r if on_a else height) % count == 0)
    return group.spec(
        _FACTORS,
        partial(_blocks, count, on_a),
        d_out=d_out,
        d_in=d_in,
        rank=r,
        scaling=settings.config.scaling_of(group.module, r),
    )


def _blocks(count: int, on_a: bool, a: Tensor, b: Tensor) -> Units:
    if on_a:
        return Units(blocks.block_diagonal(a, count), precise(b))
    return Units(precise(a), blocks.block_diagonal(b, count))


def _qalora(group: Group, settings: Settings) -> ModuleSpec:
    size = int(settings.said("qalora_group_size", 16))
    (r, groups), (d_out, columns) = (group.shape(part, 2) for part in _FACTORS)
    group.check(r == columns)
    return group.spec(
        _FACTORS,
        partial(_pooled, size),
        d_out=d_out,
        d_in=groups * size,
        rank=r,
        scaling=settings.config.scaling_of(group.module, r),
    )


def _pooled(size: int, a: Tensor, b: Tensor) -> Units:
    return Units(blocks.pooled(a, size), precise(b))


def _kasa(group: Group, settings: Settings) -> ModuleSpec:
    plain = _plain(group, settings)
    group.check(group.shape("lora_diag") == (plain.rank,))
    return _with_base(
        group, plain, (*_FACTORS, "lora_diag"), partial(_kasa_units, plain.rank, plain.scaling)
    )


def _kasa_units(
    rank: int, scaling: float, a: Tensor, b: Tensor, diagonal: Tensor, *, base: BaseWeight
) -> Units:
    units = scaled(product(a, b), scaling * precise(diagonal))
    return with_base.tail_removed(units, rank, base=base)


def _mutated(group: Group, settings: Settings) -> ModuleSpec:
    """PiSSA and OLoRA: the base that the adapter belongs to lacks its own first B A."""
    plain = _plain(group, settings)
    init = str(settings.config.init).lower()
    if settings.config.fan_in_fan_out and init == "olora":
        group.refuse("OLoRA of a Conv1D", "leave this adapter out")
    head = _olora_head if init == "olora" else _pissa_head
    units = partial(_difference, head, plain.rank, plain.scaling)
    return _with_base(group, plain, _FACTORS, units)


def _difference(
    head: Callable[[Tensor, int, float], Units],
    rank: int,
    scaling: float,
    a: Tensor,
    b: Tensor,
    *,
    base: BaseWeight,
) -> Units:
    return with_base.difference(scaled(product(a, b), scaling), head(base.dense(), rank, scaling))


def _pissa_head(weight: Tensor, rank: int, _: float) -> Units:
    """The largest singular triplets: what s B A was at the start, whatever its signs."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return Units(vh[:rank], u[:, :rank] * s[:rank])


def _olora_head(weight: Tensor, rank: int, scaling: float) -> Units:
    """Columns and rows of a QR: B A at the start, and PEFT takes s B A from the base."""
    q, r = torch.linalg.qr(weight)
    return Units(scaling * r[:rank], q[:, :rank])


def _with_base(
    group: Group, plain: ModuleSpec, parts: tuple[str, ...], units: Callable[..., Units]
) -> ModuleSpec:
    """Twice the units, the scaling folded in."""
    return group.spec(
        parts,
        units,
        d_out=plain.d_out,
        d_in=plain.d_in,
        rank=2 * plain.rank,
        verdict="exact-with-base",
        needs_base=True,
    )


_BY_FIELD: dict[str, Variant] = {
    "velora_config": Variant("VeLoRA", _plain, "lora_velora_embed"),
    "monteclora_config": Variant(
        "MonteCLoRA", _plain, "lora_monteclora_sampler.", "MonteCLoRA: its mean is taken"
    ),
    "use_bdlora": Variant("BD-LoRA", _bdlora),
    "use_qalora": Variant("QA-LoRA", _qalora),
    "kasa_config": Variant("KaSA", _kasa),
    "use_dora": Variant("DoRA", dora),
}
_BY_INIT = {"pissa": Variant("PiSSA", _mutated), "olora": Variant("OLoRA", _mutated)}


def _variant(config: AdapterConfig | None) -> Variant | None:
    """The one variant that a config asks for; two at once are nobody's."""
    if config is None or config.peft_type != "LORA":
        return None
    fields = [field for field, known in VARIANTS.items() if known.present(config.raw.get(field))]
    init = _BY_INIT.get(str(config.init).lower())
    if init is not None:
        return None if fields else init
    return _BY_FIELD.get(fields[0]) if len(fields) == 1 else None


def _recognises(header: Header) -> bool:
    return _variant(header.config) is not None


def _claim(header: Header) -> Claims:
    config = header.said()
    variant = _variant(config)
    assert variant is not None
    keys, shared, rest = sort_keys(header, "lora_")
    settings = Settings(header, config, shared, len(keys))
    ignored = {
        key: ""
        for parts in keys.values()
        for part, key in parts.items()
        if variant.ignored and part.startswith(variant.ignored)
    }
    modules = {
        module: variant.module(Group(header, module, parts), settings)
        for module, parts in sorted(keys.items())
    }
    if not modules:
        settings.refuse("no module has lora_A", "the file does not fit its config")
    is_whole = whole_parameters(config, modules)
    extras = {
        name: ExtraSpec(name, key, *header.entries[key])
        for name, key in sorted(rest.items())
        if is_whole(name, key)
    }
    return Claims(config, modules, extras, ignored, (variant.note,) if variant.note else ())


LORA_VARIANTS = Dialect("peft-lora-variant", "a variant of PEFT LoRA", _recognises, _claim)
