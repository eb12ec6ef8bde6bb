"""PEFT LoRA, and AdaLoRA and SoRA, which are LoRA with a gate on every unit."""

from math import prod

from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.dialects.dialect import Claims, Dialect, Entries, Header
from lora_merge.adapters.dialects.looks_like import refuse_unclaimed
from lora_merge.adapters.dialects.peft_names import FactorKeys, sort_keys
from lora_merge.adapters.dialects.peft_variants import refuse_variants
from lora_merge.adapters.dialects.peft_whole import whole_parameters
from lora_merge.adapters.dialects.recipes.gates import gated
from lora_merge.adapters.forms import ExtraSpec, Form, ModuleSpec
from lora_merge.adapters.units import Recipe
from lora_merge.errors import AdapterError
from lora_merge.files.tensor_file import DTYPES, widest_dtype

_TYPES = ("LORA", "ADALORA", "SORA")


def _recognises(header: Header) -> bool:
    """Factors named as PEFT names them, or a config that says so."""
    said = header.config is not None and header.config.peft_type in _TYPES
    return said or any(".lora_A" in key or ".lora_embedding_A" in key for key in header.entries)


def _claim(header: Header) -> Claims:
    name, entries = header.adapter, header.entries
    if header.config is not None:
        _refuse_other_types(header.config, name)
        refuse_variants(header.config, name)
    table = sort_keys(entries, name)
    if not table.factors:
        refuse_unclaimed(header, list(table.extras), whole=True)
    config = header.said()
    emptied = [m for m, keys in table.factors.items() if keys.gate and 0 in entries[keys.gate][1]]
    modules = {
        module: _module_spec(module, keys, config, entries, name)
        for module, keys in sorted(table.factors.items())
        if module not in emptied
    }
    ignored = dict(table.ignored)
    notes = []
    if emptied:
        notes.append(f"{len(emptied)} modules have no rank left ({emptied[0]}); they add nothing")
        ignored |= {key: "" for m in emptied for key in table.factors[m].all()}
    if not modules:
        raise AdapterError(
            f"{name}: no module has any rank left", "it changes nothing: leave it out"
        )
    if table.rewrapped:
        notes.append("keys are wrapped by PEFT more than once; unwrapped")
    is_whole = whole_parameters(config, modules)
    extras = {
        extra: ExtraSpec(extra, key, *entries[key])
        for extra, key in sorted(table.extras.items())
        if is_whole(extra, key)
    }
    return Claims(config, modules, extras, ignored, tuple(notes))


def _refuse_other_types(config: AdapterConfig, adapter: str) -> None:
    if config.peft_type not in _TYPES:
        raise AdapterError(
            f"{adapter}: peft_type is {config.raw.get('peft_type')!r}, not LORA",
            "leave this adapter out",
        )


def _module_spec(
    module: str,
    keys: FactorKeys,
    config: AdapterConfig,
    entries: Entries,
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
        dtype=widest_dtype((dtype, dtype_b)),
        recipe=Recipe((key_a, key_b))
        if keys.gate is None
        else Recipe((key_a, key_b, keys.gate), gated),
        kernel=kernel,
        num_experts=experts,
        key_bias=keys.bias,
    )


def _check_gate(
    keys: FactorKeys,
    config: AdapterConfig,
    entries: Entries,
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


PEFT_LORA = Dialect("peft-lora", "PEFT LoRA", _recognises, _claim)
