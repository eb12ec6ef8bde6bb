"""One LoRA adapter: opened lazily, read module by module."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lora_merge.adapters.config import AdapterConfig, read_config
from lora_merge.adapters.keys import FactorKeys, sort_keys
from lora_merge.adapters.modules import Form, ModuleSpec
from lora_merge.adapters.source import Source, resolve
from lora_merge.adapters.tensors import (
    DTYPES,
    SafetensorsFile,
    TensorSource,
    load_pickle,
    refuse_non_finite,
)
from lora_merge.errors import AdapterError


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


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter whose tensors stay on disk until a module is read.

    Attributes:
        name: What the user called it; used in every message.
        config: What its tensors mean.
        modules: Adapted modules by name, in name order.
        extras: Tensors that are not factors, by name.
        tensors: Where the tensors are.
        source: Its files, None for an adapter made in memory.
        notes: Oddities of the files that were understood, in words.
        texts: Text files that belong beside it when it is saved (model card, recipe), by name.
    """

    name: str
    config: AdapterConfig
    modules: Mapping[str, ModuleSpec]
    extras: Mapping[str, ExtraSpec]
    tensors: TensorSource
    source: Source | None = None
    notes: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_pretrained(cls, ref: str | Path, *, allow_pickle: bool = False) -> "Adapter":
        """Open one adapter: a directory, a `.safetensors` file or a Hub reference.

        Reads the header and the config only.

        Raises:
            SourceError: If nothing is found.
            AdapterError: If it is no plain LoRA adapter.
        """
        return open_adapter(resolve(str(ref), allow_pickle=allow_pickle))

    def save_pretrained(self, out: str | Path, *, force: bool = False) -> None:
        """Write it as a PEFT directory in the portable layout; `force` replaces one.

        Raises:
            OutputError: If it cannot be written; nothing is left behind.
        """
        from lora_merge.adapters.save import save_adapter

        save_adapter(self, Path(out), force=force)

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Upload it to a Hub repository and return the commit's address.

        Raises:
            OutputError: If the Hub refuses.
        """
        from lora_merge.adapters.save import push_adapter

        return push_adapter(self, repo, private=private)

    @property
    def num_parameters(self) -> int:
        """Entries of all factors."""
        return sum(spec.num_parameters for spec in self.modules.values())

    def ranks(self) -> Counter[int]:
        """How many modules have each rank."""
        return Counter(spec.rank for spec in self.modules.values())

    def read(self, module: str) -> tuple[Tensor, Tensor]:
        """Stored A and B of a module, as they are in the file.

        A gate (AdaLoRA, SoRA) is folded into A, in float32 at least: the product of two 16-bit
        numbers is exact there.
        """
        spec = self.modules[module]
        a, b = self.tensors.read(spec.key_a), self.tensors.read(spec.key_b)
        if spec.key_gate is not None:
            gate = self.tensors.read(spec.key_gate).reshape(-1, *[1] * (a.ndim - 1))
            precise = torch.promote_types(a.dtype, torch.float32)
            a = a.to(precise) * gate.to(precise)
        return a, b

    def read_bias(self, module: str) -> Tensor | None:
        """What a module's `lora_bias` adds to its output: scaling * bias, float64, shape (d_out,).

        None where the module has none.

        Raises:
            AdapterError: If it is not finite.
        """
        spec = self.modules[module]
        if spec.key_bias is None:
            return None
        bias = self.tensors.read(spec.key_bias)
        refuse_non_finite(bias, f"{self.name}: {module}: the bias on B")
        return bias.to(torch.float64) * spec.scaling

    def read_extra(self, name: str) -> Tensor:
        """A tensor that is not a factor, as stored.

        Raises:
            AdapterError: If it is not finite.
        """
        tensor = self.tensors.read(self.extras[name].key)
        refuse_non_finite(tensor, f"{self.name}: {name}")
        return tensor


def open_adapter(source: Source, *, fallback: AdapterConfig | None = None) -> Adapter:
    """Open an adapter from its files; reads headers only (a pickle is loaded whole).

    Args:
        source: Its files.
        fallback: Config to use where the files hold none.

    Raises:
        AdapterError: If it is no plain LoRA adapter; the message names file, module and remedy.
    """
    name = source.ref
    if source.config is not None:
        config: AdapterConfig | None = read_config(source.config, name)
    else:
        config = fallback
    tensors: TensorSource
    if source.is_pickle:
        tensors = load_pickle(source.weights, name)
    else:
        tensors = SafetensorsFile(source.weights, name)
    return build_adapter(name, config, tensors, source=source)


def build_adapter(
    name: str,
    config: AdapterConfig | None,
    tensors: TensorSource,
    *,
    source: Source | None = None,
) -> Adapter:
    """Make an adapter from tensors and their config; checks every shape against every other."""
    entries = tensors.entries()
    table = sort_keys(entries, name)
    if config is None:
        raise AdapterError(
            f"{name}: no adapter_config.json, so the scaling is unknown",
            "put the config beside the file, or give --alpha (and --rslora)",
        )
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
    return Adapter(name, config, modules, extras, tensors, source, tuple(notes))


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
            "they were probably saved from an unsharded run; gather the shards before saving",
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
