"""Which tensor of a base checkpoint each part of an adapter changes, and how it lies there."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.alignment import align
from lora_merge.adapters.base_names import Naming, find_naming
from lora_merge.adapters.base_weights import lies_transposed
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.module_names import unwrapped
from lora_merge.errors import AdapterError
from lora_merge.files.checkpoint import Checkpoint
from lora_merge.files.tensor_file import DTYPES
from lora_merge.reshape.vocabulary import (
    HEAD,
    check_resized,
    embedding_of,
    is_vocabulary,
    resize_remedy,
    untie_head,
)

# How a weight lies in the base: as B @ A, or transposed.
Layout = Literal["plain", "transposed"]

# Models whose experts are stored (experts, in, out); told apart by shape unless square.
_TRANSPOSED_EXPERTS = ("gpt_oss", "llama4_text", "llama4")


@dataclass(frozen=True, eq=False)
class Target:
    """One adapted module and the tensor it changes.

    Attributes:
        module: The module.
        tensor: Name of the tensor.
        layout: How it lies.
        bias: Name of the bias that a `lora_bias` is added to.
    """

    module: AlignedModule
    tensor: str
    layout: Layout
    bias: str | None = None


@dataclass(frozen=True, eq=False)
class Match:
    """How an adapter and a base fit together. Names are those of the base's file.

    Attributes:
        targets: What gets a delta.
        whole: Tensors the adapter stores whole: name in the adapter → name in the base.
        new: Tensors the base does not have: name → (dtype code, shape).
        untied: Of these, the copies of tensors that the base stores once for two uses: name →
            name of the original.
        prefix: What all names of the base must be prefixed with, because the tensors that are new
            belong to a model around it (a classifier on a bare encoder).
        resized: Tensors of the base that give way to one of `new` with another number of rows: the
            vocabulary grew.
        unties: Whether the embedding and the head no longer are one tensor.
        notes: What the user should know.
    """

    targets: tuple[Target, ...]
    whole: Mapping[str, str]
    new: Mapping[str, tuple[str, tuple[int, ...]]]
    untied: Mapping[str, str]
    prefix: str
    resized: frozenset[str]
    unties: bool
    notes: tuple[str, ...]


def match_adapter(adapter: Adapter, base: Checkpoint) -> Match:
    """Find what an adapter changes.

    Raises:
        AdapterError: If a module has no tensor in the base, or one of another shape or dtype.
    """
    _refuse_quantised(adapter, base)
    modules = align([adapter]).modules
    naming = find_naming(adapter, modules, base)
    new: dict[str, tuple[str, tuple[int, ...]]] = {}
    untied: dict[str, str] = {}
    resized: set[str] = set()
    whole = _whole_tensors(adapter, naming, base, new, resized)
    check_resized(adapter, base, whole, new, resized, renamed=naming != Naming())
    targets = []
    for module in modules:
        stem = naming.base_name(unwrapped(module.name))
        spec = module.first
        name = naming.base_name(spec.tensor)
        if name not in base.tensors and name == HEAD:
            untied[name] = embedding_of(adapter, base)
        place = base.tensors[untied.get(name, name)]
        if place.dtype not in DTYPES:
            raise AdapterError(
                f"{adapter.name}: {name} is {place.dtype} in the base, which is quantised",
                "fuse into the unquantised base model, then quantise the result",
            )
        if name in untied:
            new[name] = (place.dtype, place.shape)
        shape = new[name][1] if name in resized else place.shape
        layout = _layout(adapter, module, shape, base)
        bias = f"{stem}.bias" if module.first.key_bias else None
        if bias is not None and bias not in base.tensors:
            raise AdapterError(
                f"{adapter.name}: {module.name} has a bias on B, but the base has no {bias}",
                "this adapter cannot be fused; keep it beside the base",
            )
        targets.append(Target(module, name, layout, bias))
    unties = untie_head(base, {t.tensor for t in targets} | set(whole.values()), new, untied)
    prefix = naming.strip if new and not naming.add else ""
    notes = _notes(new, untied, resized)
    return Match(tuple(targets), whole, new, untied, prefix, frozenset(resized), unties, notes)


def _refuse_quantised(adapter: Adapter, base: Checkpoint) -> None:
    """A quantised base says so in its config, whatever its tensors are called."""
    quantised = base.config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        raise AdapterError(
            f"{adapter.name}: {base.folder} is quantised ({method or 'see its config.json'}), and "
            "no delta can be added to quantised weights",
            "fuse into the unquantised base model, then quantise the result",
        )


def _matrices(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 3 else (1, *shape)


def _layout(
    adapter: Adapter, module: AlignedModule, shape: tuple[int, ...], base: Checkpoint
) -> Layout:
    spec = module.first
    plain, transposed = (spec.d_out, spec.d_in), (spec.d_in, spec.d_out)
    if spec.form == "experts":
        matrix = _matrices(shape)[1:]
    elif spec.form == "conv":
        same_kernel = shape[2:] == spec.kernel and prod(shape[1:]) == spec.d_in
        matrix = (shape[0], spec.d_in) if same_kernel else shape
    else:
        matrix = shape
    if matrix not in (plain, transposed):
        raise AdapterError(
            f"{adapter.name}: {module.name} is {spec.d_out} x {spec.d_in}, the base's tensor "
            f"{' x '.join(map(str, shape))}",
            resize_remedy(max(spec.d_out, spec.d_in))
            if is_vocabulary(f"{unwrapped(module.name)}.weight")
            else "is this the base model the adapter was trained on?",
        )
    if spec.form == "conv":
        return "plain"
    if plain != transposed:
        return "plain" if matrix == plain else "transposed"
    return _layout_of_square(adapter, spec, base)


def _layout_of_square(adapter: Adapter, spec: ModuleSpec, base: Checkpoint) -> Layout:
    """What the shape of a square weight does not tell."""
    if spec.form == "embedding":
        return "transposed"
    if spec.form == "experts":
        turned = base.config.get("model_type") in _TRANSPOSED_EXPERTS
    else:
        turned = lies_transposed(base, spec.name, adapter.config)
    return "transposed" if turned else "plain"


def _whole_tensors(
    adapter: Adapter,
    naming: Naming,
    base: Checkpoint,
    new: dict[str, tuple[str, tuple[int, ...]]],
    resized: set[str],
) -> dict[str, str]:
    """Biases and modules saved whole: name in the adapter → in the base.

    Adds to `new` what the base does not have, and to both what it has with other rows.
    """
    whole = {}
    for extra in adapter.extras.values():
        name = naming.base_name(unwrapped(extra.name))
        place = base.tensors.get(name)
        if extra.dtype not in DTYPES or (place is not None and place.dtype not in DTYPES):
            raise AdapterError(
                f"{adapter.name}: {extra.name} is {extra.dtype}, not a float tensor", "convert it"
            )
        if place is None:
            new[name] = (extra.dtype, extra.shape)
        elif place.shape != extra.shape:
            if not is_vocabulary(name) or place.shape[1:] != extra.shape[1:]:
                raise AdapterError(
                    f"{adapter.name}: {extra.name} is {list(extra.shape)}, the base's "
                    f"{list(place.shape)}",
                    "is this the base model the adapter was trained on?",
                )
            new[name] = (place.dtype, extra.shape)
            resized.add(name)
        whole[extra.name] = name
    return whole


def _notes(
    new: Mapping[str, object], untied: Mapping[str, str], resized: set[str]
) -> tuple[str, ...]:
    notes = [
        f"{name} shared the storage of {source}; they differ now, so each has its own"
        for name, source in untied.items()
    ]
    if resized:
        notes.append(f"the vocabulary was resized: {', '.join(sorted(resized))}")
    added = sorted(set(new) - {HEAD} - resized)
    if added:
        notes.append(
            f"{len(added)} tensors that the base does not have were added ({added[0]}); set the "
            "task's architecture and labels in config.json"
        )
    return tuple(notes)
