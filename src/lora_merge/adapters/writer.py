"""Write a LoRA adapter that loads everywhere, one module at a time, in one of `formats/`.

The portable layout: all scaling folded into the factors, one rank for all modules (zero-padded),
`lora_alpha = r`, no rsLoRA, no patterns. Every runtime then computes scaling 1, whatever it does
with `rank_pattern` (vLLM ignores it, llama.cpp divides by each tensor's own rank).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.config import AdapterConfig, RankLayout
from lora_merge.adapters.formats.file_format import FileFormat
from lora_merge.adapters.formats.peft import PEFT
from lora_merge.adapters.formats.table import naming_of
from lora_merge.adapters.forms import ModuleSpec, to_stored
from lora_merge.adapters.identity.expert_names import equal_experts, is_expert_module, with_wrappers
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.adapters.references import CONFIG_NAME
from lora_merge.errors import AdapterError
from lora_merge.files.atomic import atomic_directory
from lora_merge.files.tensor_file import DTYPES
from lora_merge.files.tensor_stream import cast_to

R = TypeVar("R")


# The first PEFT that stores experts the way round that modules have them here.
NEW_EXPERTS = "0.19.0"


class Origin(Protocol):
    """What an output takes over from an adapter that it is made of."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def config(self) -> AdapterConfig:
        """Its config."""

    @property
    def modules(self) -> Mapping[str, ModuleSpec]:
        """Its modules."""

    @property
    def dialect(self) -> str:
        """Name of the dialect that it was read in."""


@dataclass(frozen=True)
class OutputPlan:
    """What the written adapter will be; known before any tensor is computed.

    Attributes:
        modules: Geometry of every module, by name.
        ranks: Rank that each module is written with.
        dtype: safetensors dtype code of the factors.
        biases: Modules whose B has a bias (`lora_bias`); all linear modules if any has one.
        extras: Tensors that are not factors: name → (dtype code, shape).
        config: PEFT's `adapter_config.json`.
        file_format: How it is written.
        architecture: llama.cpp's name of the model's architecture.
    """

    modules: Mapping[str, ModuleSpec]
    ranks: Mapping[str, int]
    dtype: str
    biases: tuple[str, ...]
    extras: Mapping[str, tuple[str, tuple[int, ...]]]
    config: Mapping[str, Any]
    file_format: FileFormat = PEFT
    architecture: str | None = None

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name → (dtype code, shape) of every tensor in the file."""
        written = self.file_format
        entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, spec in self.modules.items():
            shapes = written.shapes(spec, self.ranks[name])
            entries |= {
                key: (self.dtype, shape)
                for key, shape in zip(written.keys(spec), shapes, strict=True)
            }
            entries |= dict.fromkeys(written.scalars(spec, self.ranks[name]), (self.dtype, ()))
        if written.bias is not None:
            for name in self.biases:
                entries[written.bias(name)] = (self.dtype, (self.modules[name].d_out,))
        for name, entry in self.extras.items():
            entries[written.extra(name)] = entry
        return entries

    @property
    def metadata(self) -> dict[str, str]:
        """What the file's header says."""
        return dict(self.file_format.metadata(self)) or {"format": "pt"}

    @property
    def num_bytes(self) -> int:
        """Size of the weights' file."""
        return self.file_format.container.header(self.entries(), self.metadata)[2]


def plan_output(
    adapters: Sequence[Origin],
    modules: Sequence[AlignedModule],
    ranks: Mapping[str, int],
    *,
    dtype: str,
    layout: RankLayout = "uniform",
    extras: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    base_model: str | None = None,
    file_format: FileFormat = PEFT,
    peft_version: str = NEW_EXPERTS,
) -> OutputPlan:
    """Decide names, shapes and config of an adapter made from others.

    Args:
        adapters: Where it comes from: decides targets, task type, biases and saved modules.
        modules: The modules it has.
        ranks: Rank of each module's result.
        dtype: safetensors dtype code of the factors.
        layout: "uniform" pads all modules to the largest rank; "per-module" writes
            `rank_pattern` and `alpha_pattern`, which llama.cpp and vLLM do not read.
        extras: Tensors that are not factors and are kept.
        base_model: Base model to name; default: the first one that an adapter names.
        file_format: How it is written.
        peft_version: The PEFT that stores experts as the modules have them.

    Raises:
        AdapterError: If one of `extras` is no float tensor, or the format cannot hold the adapter.
    """
    _check_naming(adapters, file_format)
    extras = extras or {}
    for name, (code, _) in extras.items():
        if code not in DTYPES:
            raise AdapterError(
                f"{adapters[0].name}: {name} is {code}, and only {', '.join(DTYPES)} are written",
                "take this tensor out of the adapter first",
            )
    largest = max(ranks.values())
    if layout == "uniform" and file_format.padded:
        ranks = dict.fromkeys(ranks, largest)
    specs = with_wrappers({module.name: module.first for module in modules})
    if layout == "per-module":
        ranks = equal_experts(ranks)
    has_bias = any(spec.key_bias for module in modules for spec in module.specs.values())
    biases = [n for n, s in specs.items() if s.form != "experts" and s.form != "embedding"]
    kept_bias = any(name.endswith(".bias") for name in extras)
    common = next((r for n, r in ranks.items() if is_expert_module(n)), largest)
    different = {specs[n].name: rank for n, rank in ranks.items() if rank != common}
    config: dict[str, Any] = {
        "base_model_name_or_path": base_model or _first(a.config.base_model for a in adapters),
        "bias": _first(a.config.bias for a in adapters if a.config.bias != "none") or "none"
        if kept_bias
        else "none",
        "fan_in_fan_out": any(a.config.fan_in_fan_out for a in adapters),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": common,
        "lora_bias": has_bias,
        "lora_dropout": 0.0,
        "modules_to_save": sorted({m for a in adapters for m in a.config.modules_to_save}) or None
        if extras
        else None,
        "peft_type": "LORA",
        "peft_version": peft_version,
        "r": common,
        "rank_pattern": _exact(different),
        "alpha_pattern": _exact(different),
        "revision": _common([a.config.revision for a in adapters]),
        "target_modules": _targets(adapters, specs),
        "target_parameters": _target_parameters(adapters, specs) or None,
        "task_type": _first(a.config.task_type for a in adapters),
        "use_dora": False,
        "use_rslora": False,
    }
    plan = OutputPlan(
        specs,
        ranks,
        dtype,
        tuple(biases) if has_bias else (),
        extras,
        config,
        file_format,
        _first(a.config.architecture for a in adapters),
    )
    file_format.check(plan)
    return plan


def _check_naming(adapters: Sequence[Origin], file_format: FileFormat) -> None:
    """Refuse names that the format's readers do not know."""
    for adapter in adapters:
        if naming_of(adapter) != file_format.naming:
            raise AdapterError(
                f"{adapter.name} names its modules as {naming_of(adapter)} does, which readers of "
                f"{file_format.title} do not know",
                f"lora-merge convert --to {file_format.name}",
            )


class Writer(ABC):
    """Takes an adapter module by module, from several threads; its kinds say where it goes.

    Args:
        plan: What will be written.
    """

    def __init__(self, plan: OutputPlan) -> None:
        self.plan = plan
        self.format = plan.file_format

    @abstractmethod
    def _write(self, name: str, tensor: Tensor) -> None:
        """Take one tensor of the file, in any dtype."""

    def add(
        self,
        module: str,
        results: Sequence[RankStack],
        bias: Tensor | None = None,
        *,
        balance: bool = True,
    ) -> None:
        """Write one module: one result per expert (one, usually), and B's bias where planned.

        With `balance` a unit's halves get the same norm; without, A stays as it is, also where B is
        still zero and only training will make something of it.
        """
        spec, rank, written = self.plan.modules[module], self.plan.ranks[module], self.format
        pairs = [r.balanced() if balance else r.unbalanced() for r in results]
        stored = to_stored(spec, pairs, rank)
        factors = written.arrange(spec, *stored)
        for key, factor in zip(written.keys(spec), factors, strict=True):
            self._write(key, factor)
        for key, value in written.scalars(spec, rank).items():
            self._write(key, torch.tensor(value))
        if written.bias is not None and module in self.plan.biases:
            zeros = stored[1].new_zeros(spec.d_out)
            self._write(written.bias(module), zeros if bias is None else bias)

    def add_extra(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that is not a factor."""
        self._write(self.format.extra(name), tensor)


class AdapterWriter(Writer):
    """Streams an adapter into a directory. Use as a context manager.

    Args:
        folder: An existing directory.
        plan: What will be written.
    """

    def __init__(self, folder: Path, plan: OutputPlan) -> None:
        super().__init__(plan)
        config = self.format.config(plan)
        if config is not None:
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
        self._path = folder / self.format.weights
        self._stream = self.format.container.stream(self._path, plan.entries(), plan.metadata)

    def _write(self, name: str, tensor: Tensor) -> None:
        self._stream.write(name, tensor)

    def __enter__(self) -> "AdapterWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.__exit__(kind, error, trace)
        if kind is None and self.format.finish is not None:
            self.format.finish(self._path)


def save_output(
    out: Path,
    plan: OutputPlan,
    fill: Callable[[Writer], R],
    texts: Callable[[R], Mapping[str, str]],
    *,
    force: bool = False,
    inputs: Sequence[Path] = (),
) -> R:
    """Make an adapter's directory, whole or not at all.

    Args:
        out: The directory to make.
        plan: What it will be.
        fill: Writes every tensor of the plan.
        texts: Name → text of the files beside the tensors, from what `fill` returned.
        force: Replace a directory that lora-merge wrote.
        inputs: Files that are read.

    Returns:
        What `fill` returned.

    Raises:
        OutputError: If the directory cannot be written; nothing is left behind.
    """
    with atomic_directory(out, force=force, inputs=inputs, needed=plan.num_bytes) as folder:
        with AdapterWriter(folder, plan) as writer:
            done = fill(writer)
        for name, text in texts(done).items():
            (folder / name).write_text(text, encoding="utf-8")
    return done


class TensorWriter(Writer):
    """Collects the tensors of an adapter in memory, named as in its file.

    Args:
        plan: What will be collected.

    Attributes:
        tensors: What has come so far.
    """

    def __init__(self, plan: OutputPlan) -> None:
        super().__init__(plan)
        self.tensors: dict[str, Tensor] = {}
        self._entries = plan.entries()

    def _write(self, name: str, tensor: Tensor) -> None:
        code, _ = self._entries[name]
        self.tensors[name] = cast_to(tensor.detach().cpu(), code, name).contiguous()


def _targets(adapters: Sequence[Origin], specs: Mapping[str, ModuleSpec]) -> list[str]:
    """Names for `target_modules`: the adapters' own short names where they say the same thing."""
    names = [name for name, spec in specs.items() if spec.parameter is None]
    lists = [a.config.target_modules for a in adapters]
    whole = all(name in specs for a in adapters for name in a.modules)
    named = all(isinstance(one, tuple) for one in lists)
    if whole and named and not any(a.config.partial for a in adapters):
        said = {target for one in lists for target in one or ()}
        short = sorted(t for t in said if any(n == t or n.endswith("." + t) for n in names))
        if all(any(n == t or n.endswith("." + t) for t in short) for n in names):
            return short
    return names


def _target_parameters(adapters: Sequence[Origin], specs: Mapping[str, ModuleSpec]) -> list[str]:
    """Names for `target_parameters`: the adapters' own where they say the same thing."""
    names = [spec.tensor for spec in specs.values() if spec.parameter is not None]
    own = sorted({target for a in adapters for target in a.config.target_parameters})
    found = {t: [n for n in names if n == t or n.endswith("." + t)] for t in own}
    whole = all(name in specs for a in adapters for name in a.modules)
    if whole and all(found.values()) and set().union(*found.values()) == set(names):
        return own
    return sorted(names)


def _exact(values: Mapping[str, int]) -> dict[str, int]:
    """Patterns that match one module each: dots escaped, since PEFT reads them as regexes."""
    return {"^" + name.replace(".", r"\."): value for name, value in values.items()}


def _first(values: Any) -> Any:
    return next((value for value in values if value), None)


def _common(values: Sequence[str | None]) -> str | None:
    return values[0] if len(set(values)) == 1 else None
