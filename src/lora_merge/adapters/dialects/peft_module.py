"""One module of a PEFT LoRA: shapes, dtypes and config, each checked against the others."""

from math import prod

from lora_merge.adapters.config import AdapterConfig, matching_keys
from lora_merge.adapters.dialects.dialect import Entries
from lora_merge.adapters.dialects.peft_experts import Wrapped
from lora_merge.adapters.dialects.peft_names import FactorKeys
from lora_merge.adapters.dialects.peft_targets import check_alpha
from lora_merge.adapters.dialects.recipes.gates import gated
from lora_merge.adapters.forms import Form, ModuleSpec
from lora_merge.adapters.units import Recipe
from lora_merge.errors import AdapterError
from lora_merge.files.tensor_file import DTYPES, widest_dtype


def module_spec(
    module: str,
    keys: FactorKeys,
    config: AdapterConfig,
    entries: Entries,
    adapter: str,
    wrapped: Wrapped | None = None,
) -> ModuleSpec:
    """One module of a file, from the names and shapes of its factors.

    Args:
        module: Where its factors stand.
        keys: Their names.
        config: What they mean.
        entries: Name → (dtype code, shape) of the file's tensors.
        adapter: The adapter's name, for messages.
        wrapped: The parameter that is adapted instead of a module.

    Raises:
        AdapterError: If shapes, dtypes and config do not belong together; names the module.
    """
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
    name = module if wrapped is None else wrapped.name
    form = _form_of(keys, wrapped, shape_a)
    rank, experts = _rank_of(name, form, config, shape_a[0], where)
    check_alpha(config, name, adapter)
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
        name=name,
        form=form,
        d_out=shape_b[0],
        d_in=prod(shape_a[1:]),
        rank=rank,
        scaling=config.scaling_of(name, rank),
        dtype=widest_dtype((dtype, dtype_b)),
        recipe=Recipe((key_a, key_b))
        if keys.gate is None
        else Recipe((key_a, key_b, keys.gate), gated),
        kernel=kernel,
        num_experts=experts,
        key_bias=keys.bias,
        parameter=None if wrapped is None else wrapped.parameter,
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


def _form_of(keys: FactorKeys, wrapped: Wrapped | None, shape_a: tuple[int, ...]) -> Form:
    if keys.embedding:
        return "embedding"
    if len(shape_a) > 2:
        return "conv"
    # A matrix that is a parameter of its module (a router's weight) is stored as a Linear's is.
    return "linear" if wrapped is None or wrapped.parameter == "weight" else "experts"


def _rank_of(
    module: str, form: Form, config: AdapterConfig, rows: int, where: str
) -> tuple[int, int]:
    """(rank, number of experts) of a module; refuses a config that contradicts the tensors."""
    said = config.rank_of(module) or rows
    ranks = [config.rank_pattern[key] for key in matching_keys(config.rank_pattern, module)]
    if form == "experts":
        if len(set(ranks)) < 2 and rows % said == 0:
            return said, rows // said
    elif rows in (said, *ranks):  # PEFT sorts the patterns it saves: another one may be meant
        return rows, 1
    raise AdapterError(
        f"{where}: the tensors have rank {rows}, adapter_config.json says {said}",
        "correct r or rank_pattern in adapter_config.json",
    )
