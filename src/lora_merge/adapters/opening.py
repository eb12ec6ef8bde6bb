"""From a file's header to what an adapter holds: every shape is checked against every other."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from lora_merge.adapters.config import AdapterConfig, check_alphas
from lora_merge.adapters.forms import Form, ModuleSpec
from lora_merge.adapters.tensor_names import FactorKeys, sort_keys
from lora_merge.errors import AdapterError
from lora_merge.files.tensor_file import DTYPES


@dataclass(frozen=True)
class ExtraSpec:
    """A tensor that is not a low-rank factor: a bias, or a tensor of a module saved whole.

    Attributes:
        name: Name in the base model.
        key: Name in the file.
        dtype: safetensors dtype code.
        shape: Its shape.
    """

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """What a file of tensors holds, as its header and the config tell.

    Attributes:
        config: What the tensors mean.
        modules: Adapted modules by name, in name order.
        extras: Tensors that are not factors, by name.
        notes: Oddities that were understood, in words.
    """

    config: AdapterConfig
    modules: Mapping[str, ModuleSpec]
    extras: Mapping[str, ExtraSpec]
    notes: tuple[str, ...]


def read_contents(
    name: str,
    config: AdapterConfig | None,
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
) -> Contents:
    """Tell what tensors are, by their names, dtypes and shapes; every shape is checked.

    Args:
        name: What messages call the adapter.
        config: Its config, None where there is none.
        entries: Tensor name → (dtype code, shape).

    Raises:
        AdapterError: If it is no plain LoRA adapter; the message names file, module and remedy.
    """
    table = sort_keys(entries, name)
    if config is None:
        raise AdapterError(
            f"{name}: no adapter_config.json, so the scaling is unknown",
            "put the config beside the file, or give --alpha (and --rslora)",
        )
    check_alphas(config, name)
    notes = []
    emptied = [m for m, keys in table.factors.items() if keys.gate and 0 in entries[keys.gate][1]]
    if emptied:
        notes.append(f"{len(emptied)} modules have no rank left ({emptied[0]}); they add nothing")
    modules = {
        module: _module_spec(module, keys, config, entries, name)
        for module, keys in sorted(table.factors.items())
        if module not in emptied
    }
    if not modules:
        raise AdapterError(
            f"{name}: no module has any rank left", "it changes nothing: leave it out"
        )
    extras = {
        extra: ExtraSpec(extra, key, *entries[key]) for extra, key in sorted(table.extras.items())
    }
    if table.rewrapped:
        notes.append("keys are wrapped by PEFT more than once; unwrapped")
    used = sum(
        key is not None for k in table.factors.values() for key in (k.a, k.b, k.bias, k.gate)
    )
    copies = len(entries) - len(extras) - used
    if copies:
        notes.append(f"{copies} tensors are copies left by PEFT's wrappers; ignored")
    return Contents(config, modules, extras, tuple(notes))


def _module_spec(
    module: str,
    keys: FactorKeys,
    config: AdapterConfig,
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    adapter: str,
) -> ModuleSpec:
    key_a, key_b = keys.a or "", keys.b or ""
    (dtype, shape_a), (dtype_b, shape_b) = entries[key_a], entries[key_b]
    for key, code in ((key_a, dtype), (key_b, dtype_b)):
        if code not in DTYPES:
            raise AdapterError(
                f"{adapter}: {key} has dtype {code}; factors are {', '.join(DTYPES)}",
                "dequantise the adapter first",
            )
    where = f"{adapter}: {module}: A {list(shape_a)}, B {list(shape_b)}"
    if min((*shape_a, *shape_b), default=0) < 1 or len(shape_a) < 2 or len(shape_b) < 2:
        raise AdapterError(
            f"{where}: empty or flat factors",
            "they were probably saved from a sharded run; gather the shards before saving",
        )
    form = _form_of(module, keys, config, shape_a)
    rank, experts = _rank_of(module, form, config, shape_a[0], where)
    _check_gate(keys, config, entries, shape_a[0], where)
    kernel = shape_a[2:]
    if form == "conv" and shape_b[1] != rank and rank % shape_b[1] == 0:
        raise AdapterError(
            f"{where}: the B of a grouped convolution, which is no single matrix",
            "leave this module out of the adapter",
        )
    ones = shape_b[2:]
    if shape_b[1] != rank * experts or len(ones) != len(kernel) or any(n != 1 for n in ones):
        raise AdapterError(f"{where}: the shapes do not belong together", "save it again")
    if keys.bias is not None:
        code, shape = entries[keys.bias]
        if code not in DTYPES or shape != shape_b[:1]:
            raise AdapterError(
                f"{where}: the bias on B is {code} {list(shape)}, not one number per output",
                "save it again",
            )
    return ModuleSpec(
        name=module,
        form=form,
        d_out=shape_b[0],
        d_in=prod(shape_a[1:]),
        rank=rank,
        scaling=config.scaling_of(module, rank),
        dtype=dtype,
        key_a=key_a,
        key_b=key_b,
        kernel=kernel,
        num_experts=experts,
        key_bias=keys.bias,
        key_gate=keys.gate,
    )


def _check_gate(
    keys: FactorKeys,
    config: AdapterConfig,
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    rows: int,
    where: str,
) -> None:
    """A gate has one entry per unit, and AdaLoRA's stands with AdaLoRA's config alone."""
    adaptive = keys.gate is not None and "lora_E" in keys.gate
    if adaptive != (config.init_r is not None):
        raise AdapterError(
            f"{where}: lora_E {'without' if adaptive else 'is missing beside'} an AdaLoRA config",
            "put the adapter's own adapter_config.json beside its weights",
        )
    if keys.gate is None:
        return
    code, shape = entries[keys.gate]
    if code not in DTYPES or prod(shape) != rows:
        raise AdapterError(
            f"{where}: its gate is {code} {list(shape)}, not one number per unit", "save it again"
        )


def _form_of(
    module: str, keys: FactorKeys, config: AdapterConfig, shape_a: tuple[int, ...]
) -> Form:
    if keys.embedding:
        return "embedding"
    if len(shape_a) > 2:
        return "conv"
    parents = {parameter.rpartition(".")[0] for parameter in config.target_parameters}
    unwrapped = module
    while unwrapped.endswith(".base_layer"):
        unwrapped = unwrapped.removesuffix(".base_layer")
    is_expert = any(unwrapped == p or unwrapped.endswith("." + p) for p in parents if p)
    return "experts" if is_expert else "linear"


def _rank_of(
    module: str, form: Form, config: AdapterConfig, rows: int, where: str
) -> tuple[int, int]:
    """(rank, number of experts) of a module; refuses a config that contradicts the tensors."""
    rank = config.rank_of(module) or rows
    if form == "experts":
        if rows % rank == 0:
            return rank, rows // rank
    elif rows == rank:
        return rank, 1
    raise AdapterError(
        f"{where}: the tensors have rank {rows}, adapter_config.json says {rank}",
        "correct r or rank_pattern in adapter_config.json",
    )
