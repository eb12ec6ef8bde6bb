"""Lay adapters side by side: which modules there are, who has each, and whether they fit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.formats.table import check_naming
from lora_merge.adapters.forms import ModuleSpec, to_matrix
from lora_merge.adapters.identity.expert_layout import one_layout
from lora_merge.adapters.identity.twins import one_spelling, possible_twins
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import AlignmentError
from lora_merge.files.tensor_file import LARGEST_ENTRY, refuse_non_finite


@dataclass(frozen=True, eq=False)
class Alignment:
    """Adapters that fit together.

    Attributes:
        adapters: The adapters, in canonical order; owners in a stack are indices into it. Where
            they spelled one module's name differently, they have one spelling here.
        modules: The union of their modules, in name order.
        base_model: The base model they share, None where none of them says.
    """

    adapters: tuple[Adapter, ...]
    modules: tuple[AlignedModule, ...]
    base_model: str | None

    def of(self, indices: Sequence[int]) -> "Alignment":
        """Some of the adapters, in this order; nothing has to be checked again."""
        place = {index: number for number, index in enumerate(indices)}
        modules = []
        for module in self.modules:
            kept = {place[i]: spec for i, spec in module.specs.items() if i in place}
            if kept:
                modules.append(AlignedModule(module.name, dict(sorted(kept.items()))))
        adapters = tuple(self.adapters[i] for i in indices)
        named = [a.config.base_model for a in adapters if a.config.base_model]
        return Alignment(adapters, tuple(modules), min(named, default=None))


def align(adapters: Sequence[Adapter], *, accept_base_models: bool = False) -> Alignment:
    """Check that adapters can be stacked, from headers alone, and list their modules.

    Different ranks, scalings, dtypes and target modules are normal. Shapes, kinds and base models
    must agree.

    Args:
        adapters: In the order in which stacks will number them.
        accept_base_models: Accept different base models.

    Raises:
        AlignmentError: Listing every mismatch at once.
    """
    if not adapters:
        raise AlignmentError(["there are none"], "name at least one adapter")
    check_naming(adapters)
    if any(a.modules.keys() != adapters[0].modules.keys() for a in adapters):
        adapters = _one_naming(adapters)
    mismatches: list[str] = []
    base = _base_models(adapters, mismatches, accept_base_models)
    remedy = "take adapters of one base model"
    architectures = sorted({a.config.architecture for a in adapters if a.config.architecture})
    if len(architectures) > 1:
        mismatches.append(f"architectures differ: {', '.join(architectures)}")
    elif mismatches:
        remedy += (
            "; if only the names differ, --accept-base-models "
            "(accept_base_models in a recipe or in Python) takes them as one"
        )
    names = sorted({name for adapter in adapters for name in adapter.modules})
    modules = []
    for name in names:
        specs = {i: a.modules[name] for i, a in enumerate(adapters) if name in a.modules}
        modules.append(AlignedModule(name, specs))
        _check_geometry(name, specs, adapters, mismatches)
    if mismatches:
        raise AlignmentError(mismatches, remedy)
    return Alignment(tuple(adapters), tuple(modules), base)


def _one_naming(adapters: Sequence[Adapter]) -> Sequence[Adapter]:
    """Adapters with different modules: what they share has to have one name and one layout."""
    adapters = one_spelling(adapters)
    twins, rename = possible_twins(adapters)
    if twins:
        raise AlignmentError(twins, rename)
    return one_layout(adapters)


def read_stacks(
    alignment: Alignment,
    module: AlignedModule,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    staged: bool | None = None,
) -> Iterator[RankStack]:
    """Read one module of all adapters; yields one stack per expert (one, usually).

    Args:
        alignment: The adapters.
        module: Which module.
        device: Where the stacks shall be.
        dtype: Of the stacks; float32 holds 16-bit factors exactly.
        staged: Gather the factors on the host as they are stored, in pinned memory, and move them
            as one; default: where the device is a GPU.

    Raises:
        AdapterError: If a tensor holds NaN or infinity; names adapter and module.
    """
    place = torch.device(device)
    fill = _staged if (place.type == "cuda" if staged is None else staged) else _fill
    if module.first.num_experts == 1:

        def read(index: int) -> tuple[Tensor, Tensor]:
            return alignment.adapters[index].read(module.name)

        yield fill(alignment, module, read, 0, place, dtype)
        return
    # The experts share their tensors, so these are read once and kept until the last expert.
    stored = {i: alignment.adapters[i].read(module.name) for i in module.specs}
    for expert in range(module.first.num_experts):
        yield fill(alignment, module, stored.__getitem__, expert, place, dtype)


def _fill(
    alignment: Alignment,
    module: AlignedModule,
    read: Callable[[int], tuple[Tensor, Tensor]],
    expert: int | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    pinned: bool = False,
) -> RankStack:
    """Copy the stored halves straight into the stack, casting on the way: no temporaries.

    Without an expert, what is read is one expert's matrices already.
    """
    first, size = module.first, module.num_units
    down = torch.empty(size, first.d_in, dtype=dtype, device=device, pin_memory=pinned)
    up = torch.empty(first.d_out, size, dtype=dtype, device=device, pin_memory=pinned)
    scale = torch.empty(size, dtype=torch.float64)
    owner = torch.empty(size, dtype=torch.int64)
    start, sound = 0, True
    for index, spec in module.specs.items():
        a, b = read(index) if expert is None else to_matrix(spec, *read(index), expert)
        part = slice(start, start + spec.rank)
        down[part].copy_(a)
        up[:, part].copy_(b)
        for half in (a, b):  # what was just read is still in the cache; NaN is in no range
            low, high = (float(end) for end in half.aminmax())
            sound &= low >= -LARGEST_ENTRY and high <= LARGEST_ENTRY
        scale[part] = spec.scaling
        owner[part] = index
        start += spec.rank
    stack = RankStack(down, up, scale.to(device), owner.to(device))
    if not sound:
        _refuse_non_finite(alignment, module)
    return stack


def _staged(
    alignment: Alignment,
    module: AlignedModule,
    read: Callable[[int], tuple[Tensor, Tensor]],
    expert: int,
    device: torch.device,
    dtype: torch.dtype,
) -> RankStack:
    """The same by way of the host: half precision travels as it is, and all halves at once."""
    halves = {index: to_matrix(s, *read(index), expert) for index, s in module.specs.items()}
    kinds = {half.dtype for pair in halves.values() for half in pair}
    kind = kinds.pop() if len(kinds) == 1 else dtype
    kind = kind if kind in (torch.float16, torch.bfloat16) else dtype
    host = _fill(alignment, module, halves.__getitem__, None, torch.device("cpu"), kind,
                 pinned=device.type == "cuda")  # fmt: skip
    parts = (host.down, host.up, host.scale, host.owner)
    down, up, scale, owner = (part.to(device, non_blocking=True) for part in parts)
    return RankStack(down.to(dtype), up.to(dtype), scale, owner)


def _refuse_non_finite(alignment: Alignment, module: AlignedModule) -> None:
    """Name what is not finite."""
    for index in module.specs:
        halves = alignment.adapters[index].read(module.name)
        for letter, tensor in zip("AB", halves, strict=True):
            name = alignment.adapters[index].name
            refuse_non_finite(tensor, f"{name}: {module.name}: lora_{letter}")


def _base_models(adapters: Sequence[Adapter], mismatches: list[str], accept: bool) -> str | None:
    known: dict[str, str] = {}
    for adapter in adapters:
        if adapter.config.base_model:
            known.setdefault(adapter.config.base_model, adapter.name)
    if len(known) > 1 and not accept:
        mismatches.append(
            "base models differ: "
            + ", ".join(f"{base!r} ({adapter})" for base, adapter in sorted(known.items()))
        )
    return min(known) if known else None


def _check_geometry(
    name: str, specs: Mapping[int, ModuleSpec], adapters: Sequence[Adapter], mismatches: list[str]
) -> None:
    groups: dict[object, int] = {}
    for index, spec in specs.items():
        groups.setdefault(spec.geometry, index)
    if len(groups) > 1:
        mismatches.append(
            f"{name}: "
            + ", ".join(f"{_describe(specs[i])} ({adapters[i].name})" for i in groups.values())
        )


def _describe(spec: ModuleSpec) -> str:
    kernel = f" kernel {'x'.join(map(str, spec.kernel))}" if spec.kernel else ""
    experts = f" x {spec.num_experts} experts" if spec.num_experts > 1 else ""
    return f"{spec.form} {spec.d_out} x {spec.d_in}{kernel}{experts}"
