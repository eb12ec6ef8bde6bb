"""Experts under two layouts, and each as the other: exact, and decided from headers alone.

transformers 4 has a module per expert (`experts.3.up_proj`; Mixtral: `w1`, `w3`, `w2`),
transformers 5 one parameter for all (`experts.gate_up_proj`, the rows of gate above those of up).
Stacking puts the units of gate and up beside each other, B block-diagonal, as PEFT does at loading.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.identity.expert_names import expert_place, is_expert_module
from lora_merge.adapters.units import Recipe, Units
from lora_merge.errors import AdapterError
from lora_merge.files.tensor_file import TensorSource, widest_dtype

# A projection of one expert → the parameter of all, and its place among the parts of that.
_PARTS = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
}
# What transformers 5 renamed on the way.
_STEMS = (("block_sparse_moe.experts", "mlp.experts"),)


@dataclass(frozen=True)
class _Part:
    """One expert's projection inside the stacked parameter."""

    expert: int
    row: int
    unit: int
    recipe: Recipe
    factor: float


def has_expert_modules(adapter: Adapter) -> bool:
    """Whether an adapter has modules of single experts."""
    return any(map(is_expert_module, adapter.modules))


def one_layout(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Stack the experts of adapters that have them apart, where others have them stacked."""
    counts = {
        name.rpartition(".")[0]: spec.num_experts
        for adapter in adapters
        for name, spec in adapter.modules.items()
        if spec.form == "experts"
    }
    if not counts:
        return list(adapters)
    return [stacked(a, counts) if has_expert_modules(a) else a for a in adapters]


def stacked(adapter: Adapter, counts: Mapping[str, int]) -> Adapter:
    """An adapter with its expert modules as parameters.

    Args:
        adapter: The adapter.
        counts: Number of experts by stem ("model.layers.0.mlp.experts"); stems that are not there
            stay as they are.

    Raises:
        AdapterError: If it has an expert that the model has not, or one with a bias on B.
    """
    groups: dict[tuple[str, str], list[tuple[int, int, ModuleSpec]]] = {}
    modules = {}
    for name, spec in adapter.modules.items():
        single = expert_place(name)
        stem = "" if single is None else _new_stem(single.stem)
        if single is None or single.leaf not in _PARTS or stem not in counts:
            modules[name] = spec
            continue
        parameter, place = _PARTS[single.leaf]
        if spec.key_bias is not None or single.expert >= counts[stem]:
            raise AdapterError(
                f"{adapter.name}: {name} has no place among the {counts[stem]} experts of {stem}",
                "take adapters of one base model",
            )
        groups.setdefault((stem, parameter), []).append((single.expert, place, spec))
    for (stem, parameter), members in groups.items():
        name = f"{stem}.{parameter}"
        modules[name] = _stack(name, parameter, counts[stem], members, adapter.name)
    return replace(adapter, modules=dict(sorted(modules.items())))


def _new_stem(stem: str) -> str:
    for old, new in _STEMS:
        stem = stem.replace(old, new)
    return stem


def _stack(
    name: str,
    parameter: str,
    count: int,
    members: Sequence[tuple[int, int, ModuleSpec]],
    adapter: str,
    *,
    whole: bool = False,
) -> ModuleSpec:
    """The stacked parameter's spec; the parts, or whole projections, keep their own units."""
    places = 1 + max(place for owner, place in _PARTS.values() if owner == parameter)
    places = 1 if whole else places
    shapes = {(spec.d_out, spec.d_in) for _, _, spec in members}
    if len(shapes) != 1:
        raise AdapterError(
            f"{adapter}: experts of {name} have different shapes", "take adapters of one base model"
        )
    ((d_out, d_in),) = shapes
    used = sorted({place for _, place, _ in members})
    ranks = {p: max(s.rank for _, place, s in members if place == p) for p in used}
    scalings = {spec.scaling for _, _, spec in members}
    common = scalings.pop() if len(scalings) == 1 else 1.0
    parts = tuple(
        _Part(
            expert=expert,
            row=place * d_out,
            unit=sum(ranks[p] for p in used if p < place),
            recipe=spec.recipe,
            factor=spec.scaling / common if common else 1.0,
        )
        for expert, place, spec in sorted(members, key=lambda m: m[:2])
    )
    rank, rows = sum(ranks.values()), places * d_out
    return ModuleSpec(
        name=name,
        form="experts",
        d_out=rows,
        d_in=d_in,
        rank=rank,
        scaling=common,
        dtype=widest_dtype(spec.dtype for _, _, spec in members),
        recipe=Recipe(
            tuple(key for part in parts for key in part.recipe.keys),
            partial(_joined, parts=parts, shape=(count, rank, rows, d_in)),
        ),
        num_experts=count,
        parameter=parameter,
    )


def _joined(*tensors: Tensor, parts: Sequence[_Part], shape: tuple[int, int, int, int]) -> Units:
    """Factors of a stacked parameter; what no expert's part fills is zero."""
    count, rank, rows, columns = shape
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if any(part.factor != 1.0 for part in parts):
        dtype = torch.promote_types(dtype, torch.float32)
    down = torch.zeros(count, rank, columns, dtype=dtype)
    up = torch.zeros(rows, rank, count, dtype=dtype)
    read = iter(tensors)
    for part in parts:
        a, b = part.recipe.units(*(next(read) for _ in part.recipe.keys))
        units = slice(part.unit, part.unit + a.shape[0])
        down[part.expert, units] = a.to(dtype)
        up[part.row : part.row + b.shape[0], units, part.expert] = b.to(dtype) * part.factor
    return down.reshape(count * rank, columns), up.reshape(rows, rank * count)


def fit_to(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """An adapter with its experts in a base's layout, as far as the base's names tell.

    Args:
        adapter: The adapter.
        shapes: Name → shape of the base's tensors.
    """
    counts = {
        name.rpartition(".")[0]: shape[0]
        for name, shape in shapes.items()
        if name.endswith(".experts.down_proj") and len(shape) == 3
    }
    return apart(stacked(adapter, counts) if counts else adapter, shapes)


def apart(adapter: Adapter, names: Collection[str]) -> Adapter:
    """An adapter with its expert parameters as modules, where a base has them so.

    Args:
        adapter: The adapter.
        names: Names of the base's tensors; parameters that are among them stay.
    """
    modules: dict[str, ModuleSpec] = {}
    for name, spec in adapter.modules.items():
        found = {} if spec.form != "experts" or name in names else _split(spec, names)
        modules |= found or {name: spec}
    return replace(adapter, modules=dict(sorted(modules.items())))


def _split(spec: ModuleSpec, names: Collection[str]) -> dict[str, ModuleSpec]:
    """One spec per expert and part, or nothing where the base does not have all of them."""
    stem = spec.name.rpartition(".")[0]
    stems = [stem, *(stem.replace(new, old) for old, new in _STEMS)]
    for candidate in stems:
        parts = {
            leaf: place
            for leaf, (parameter, place) in _PARTS.items()
            if parameter == spec.parameter and f"{candidate}.0.{leaf}.weight" in names
        }
        if not parts:
            continue
        rows = spec.d_out // len(parts)
        return {
            f"{candidate}.{expert}.{leaf}": one_expert(
                spec, f"{candidate}.{expert}.{leaf}", expert, place * rows, rows
            )
            for leaf, place in parts.items()
            for expert in range(spec.num_experts)
        }
    return {}


def one_expert(spec: ModuleSpec, name: str, expert: int, row: int, rows: int) -> ModuleSpec:
    """Some rows of one expert of a stacked parameter, as a module of its own."""
    units = partial(_one, units=spec.recipe.units, spec=spec, expert=expert, row=row, rows=rows)
    return replace(
        spec,
        name=name,
        form="linear",
        d_out=rows,
        num_experts=1,
        parameter=None,
        wrapper=None,
        recipe=replace(spec.recipe, units=units),
    )


def _one(
    *tensors: Tensor,
    units: Callable[..., Units],
    spec: ModuleSpec,
    expert: int,
    row: int,
    rows: int,
) -> Units:
    """One expert's rows of a stacked parameter."""
    a, b = units(*tensors)
    down = a.reshape(spec.num_experts, spec.rank, spec.d_in)[expert]
    up = b.reshape(spec.d_out, spec.rank, spec.num_experts)[row : row + rows, :, expert]
    return down.contiguous(), up.contiguous()


def one_by_one(adapter: Adapter) -> Adapter:
    """An adapter whose expert parameters are a module for each expert: `experts.3.gate_up_proj`.

    No model has modules of these names; they are for what has to treat every expert by itself.
    """
    modules: dict[str, ModuleSpec] = {}
    for name, spec in adapter.modules.items():
        if spec.form != "experts":
            modules[name] = spec
            continue
        stem, _, leaf = name.rpartition(".")
        for expert in range(spec.num_experts):
            single = f"{stem}.{expert}.{leaf}"
            modules[single] = one_expert(spec, single, expert, 0, spec.d_out)
    if modules.keys() == adapter.modules.keys():
        return adapter
    tensors = _Recent(adapter.tensors)
    return replace(adapter, modules=dict(sorted(modules.items())), tensors=tensors)


def all_one_by_one(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adapters with a module for each expert, all in one layout; see `one_by_one`.

    Where one has an expert's gate and up as one projection, those that have them apart get it too.
    """
    counts: dict[str, int] = {}
    for adapter in adapters:
        for name, spec in adapter.modules.items():
            stem, _, leaf = name.rpartition(".")
            single = expert_place(name)
            if leaf == "gate_up_proj" and spec.form == "experts":
                counts[stem] = spec.num_experts
            elif leaf == "gate_up_proj" and single is not None:
                counts[single.stem] = max(counts.get(single.stem, 0), single.expert + 1)
    return [one_by_one(stacked(a, counts) if _has_parts_apart(a) else a) for a in adapters]


def _has_parts_apart(adapter: Adapter) -> bool:
    return has_expert_modules(adapter) and not is_apart(adapter.modules)


def is_apart(names: Iterable[str]) -> bool:
    """Whether among modules are projections of single experts that no model has as modules."""
    return any(name.endswith(".gate_up_proj") and is_expert_module(name) for name in names)


def stacked_again(adapter: Adapter) -> Adapter:
    """The inverse of `one_by_one`, as PEFT has it; experts of smaller rank get units of zeros."""
    if not is_apart(adapter.modules):
        return adapter
    groups: dict[tuple[str, str], list[tuple[int, int, ModuleSpec]]] = {}
    modules = {}
    for name, spec in adapter.modules.items():
        single = expert_place(name)
        if single is None:
            modules[name] = spec
            continue
        groups.setdefault((single.stem, single.leaf), []).append((single.expert, 0, spec))
    for (stem, leaf), members in groups.items():
        name, count = f"{stem}.{leaf}", 1 + max(expert for expert, _, _ in members)
        modules[name] = _stack(name, leaf, count, members, adapter.name, whole=True)
    return replace(adapter, modules=dict(sorted(modules.items())))


class _Recent:
    """Tensors of a file, the last few kept: each expert reads the tensors of all.

    Args:
        source: The file.
    """

    _MOST = 4  # A and B of two parameters, which modules in name order take in turns

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __reduce__(self) -> tuple[type, tuple[TensorSource]]:
        return type(self), (self._source,)

    def entries(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype code, shape)."""
        return self._source.entries()

    def metadata(self) -> Mapping[str, str]:
        """The file's metadata."""
        return self._source.metadata()

    def read(self, name: str) -> Tensor:
        """A tensor by its name."""
        found = self._kept.pop(name, None)
        if found is None:
            found = self._source.read(name)
        self._kept[name] = found
        while len(self._kept) > self._MOST:
            self._kept.popitem(last=False)
        return found
