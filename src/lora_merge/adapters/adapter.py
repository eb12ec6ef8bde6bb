"""One LoRA adapter: opened lazily, read module by module, written and published."""

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.adapters.access.live_peft import put_live, read_live
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.base_weights import BaseModel, CheckpointBase
from lora_merge.adapters.config import (
    AdapterConfig,
    check_alphas,
    parse_config,
    parse_config_text,
    read_config,
)
from lora_merge.adapters.dialects.beside import leftovers
from lora_merge.adapters.dialects.dialect import Header
from lora_merge.adapters.dialects.table import understand
from lora_merge.adapters.formats.file_format import FileFormat
from lora_merge.adapters.formats.peft import PEFT
from lora_merge.adapters.formats.table import format_of
from lora_merge.adapters.forms import ExtraSpec, ModuleSpec, to_matrix
from lora_merge.adapters.library.tensors import PackedTensors
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.adapters.references import Source, resolve
from lora_merge.adapters.units import BaseWeight, Units
from lora_merge.adapters.writer import OutputPlan, TensorWriter, Writer, plan_output, save_output
from lora_merge.errors import AdapterError
from lora_merge.files.checkpoint import open_checkpoint
from lora_merge.files.gguf.reading import GGUFFile
from lora_merge.files.hub import upload
from lora_merge.files.tensor_file import (
    SafetensorsFile,
    TensorDict,
    TensorSource,
    load_pickle,
    refuse_non_finite,
    widest_dtype,
)
from lora_merge.printing import Printed, Summary, notes, span

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class Adapter(Printed):
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
        dialect: Name of the dialect in which it is written.
        base: Gives a module's base weight, for recipes that need it.
    """

    name: str
    config: AdapterConfig
    modules: Mapping[str, ModuleSpec]
    extras: Mapping[str, ExtraSpec]
    tensors: TensorSource
    source: Source | None = None
    notes: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    dialect: str = "peft-lora"
    base: Callable[[str], BaseWeight] | None = None

    @classmethod
    def from_pretrained(
        cls,
        ref: str | Path,
        *,
        allow_pickle: bool = False,
        base: str | Path | None = None,
        rank: int | None = None,
    ) -> "Adapter":
        """Open one adapter: a directory, a `.safetensors` file or a Hub reference.

        Reads the header and the config only.

        Args:
            ref: What to open.
            allow_pickle: Accept a pickle, loaded with `weights_only=True`.
            base: The base model's directory, for forms whose delta depends on its weights.
            rank: Where to cut deltas of full rank; without it, adapters that have one are refused.

        Raises:
            SourceError: If nothing is found.
            AdapterError: If it is no plain LoRA adapter.
        """
        from lora_merge.adapters.adapter import open_adapter

        model = None if base is None else CheckpointBase(open_checkpoint(Path(base)))
        return open_adapter(resolve(str(ref), allow_pickle=allow_pickle), base=model, rank=rank)

    @classmethod
    def from_peft(cls, model: nn.Module, name: str = "default") -> "Adapter":
        """Copy one adapter out of a live `PeftModel`; nothing touches the disk.

        Raises:
            MethodError: If the model has no adapter of that name.
            AdapterError: If it is no plain LoRA adapter.
        """
        config, tensors = read_live(model, name)
        return build_adapter(name, parse_config(config, name), TensorDict(tensors))

    def to_peft(self, model: nn.Module, name: str = "default") -> Any:
        """Put it into a live model; nothing touches the disk.

        It arrives as `save_pretrained` would write it, frozen. In a `PeftModel` it stands beside
        the other adapters and `model.set_adapter(name)` makes it active; a plain model gets PEFT
        around it, with this adapter active.

        Returns:
            The `PeftModel`.

        Raises:
            MethodError: If the model has an adapter of that name.
            AlignmentError: If a tensor has no place in the model, which stays as it was.
            LoraMergeError: If PEFT is not installed.
        """
        plan = _portable(self)
        writer = TensorWriter(plan)
        _fill(writer, self)
        return put_live(model, name, plan.config, writer.tensors, self.name)

    def summary(self) -> Summary:
        """Base model, modules, ranks, parameters, and what is odd about it."""
        dtypes = ", ".join(sorted({spec.dtype for spec in self.modules.values()}))
        ranks = span([spec.rank for spec in self.modules.values()])
        facts = [
            ("base model", self.config.base_model or "not said"),
            ("modules", f"{len(self.modules)}, rank {ranks}"),
            ("parameters", f"{self.num_parameters:,}, {dtypes}"),
        ]
        if self.extras:
            facts.append(("extras", f"{len(self.extras)} tensors that are not factors"))
        return Summary(f"Adapter {self.name}", (*facts, *notes(self.notes)))

    def save_pretrained(self, out: str | Path, *, force: bool = False) -> None:
        """Write it as a PEFT directory in the portable layout; `force` replaces one.

        Raises:
            OutputError: If it cannot be written; nothing is left behind.
        """
        save_adapter(self, Path(out), force=force)

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Upload it to a Hub repository and return the commit's address.

        Raises:
            OutputError: If the Hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "adapter"
            save_adapter(self, target)
            return upload(target, repo, private=private, message="Upload LoRA adapter")

    @property
    def files(self) -> list[Path]:
        """What it was read from; nothing of an adapter made in memory."""
        if self.source is None:
            return []
        return [path for path in (self.source.weights, self.source.config) if path]

    @property
    def num_parameters(self) -> int:
        """Entries of all factors."""
        return sum(spec.num_parameters for spec in self.modules.values())

    def ranks(self) -> Counter[int]:
        """How many modules have each rank."""
        return Counter(spec.rank for spec in self.modules.values())

    def read(self, module: str) -> Units:
        """A and B of a module in the layout of its form, without its scaling.

        A LoRA's are as stored; a gate (AdaLoRA, SoRA) is folded into A.
        """
        base = None if self.base is None else partial(self.base, module)
        return self.modules[module].recipe.build(self.tensors.read, base)

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

    def stacks(self, module: str) -> list[RankStack]:
        """The units of a module, one stack per expert (one, usually), float32.

        Raises:
            AdapterError: If a factor is not finite.
        """
        spec = self.modules[module]
        stored = self.read(module)
        for letter, tensor in zip("AB", stored, strict=True):
            refuse_non_finite(tensor, f"{self.name}: {module}: lora_{letter}")
        pairs = [to_matrix(spec, *stored, expert) for expert in range(spec.num_experts)]
        return [RankStack.of([(a.float(), b.float(), spec.scaling)]) for a, b in pairs]


def open_adapter(
    source: Source,
    *,
    fallback: AdapterConfig | None = None,
    base: BaseModel | None = None,
    rank: int | None = None,
) -> Adapter:
    """Open an adapter from its files; reads headers only (a pickle is loaded whole).

    Args:
        source: Its files.
        fallback: Config to use where the files hold none.
        base: The base model, for forms whose delta depends on its weights.
        rank: Where to cut deltas of full rank; None refuses them.

    Raises:
        AdapterError: If a tensor or a field is not understood; names file, module and remedy.
    """
    name = source.ref
    config = fallback if source.config is None else read_config(source.config, name)
    tensors: TensorSource
    if source.member is not None:
        packed = source.member.packed.config
        config = fallback if packed is None else parse_config_text(packed, name)
        tensors = PackedTensors(source.member, name)
    elif source.is_pickle:
        tensors = load_pickle(source.weights, name)
    elif source.weights.suffix == ".gguf":
        tensors = GGUFFile(source.weights, name)
    else:
        tensors = SafetensorsFile(source.weights, name)
    adapter = build_adapter(name, config, tensors, source=source, base=base, rank=rank)
    _LOG.info("opened %s: %d modules from %s", name, len(adapter.modules), source.weights)
    return replace(adapter, notes=(*adapter.notes, *leftovers(source.weights)))


def build_adapter(
    name: str,
    config: AdapterConfig | None,
    tensors: TensorSource,
    *,
    source: Source | None = None,
    base: BaseModel | None = None,
    rank: int | None = None,
) -> Adapter:
    """Make an adapter from tensors and their config: the file's dialect claims every tensor.

    The arguments are those of `open_adapter`.

    Raises:
        AdapterError: If a tensor or a field is not understood; names file, module and remedy.
    """
    if config is not None:
        check_alphas(config, name)
    entries = tensors.entries()

    def scalar(key: str) -> float:
        if prod(entries[key][1]) != 1:
            raise AdapterError(f"{name}: {key} is no single number", "save the adapter again")
        return float(tensors.read(key).item())

    header = Header(name, entries, config, tensors.metadata(), scalar, rank, base)
    dialect, claims = understand(header)
    weight = None
    if base is not None:
        weight = partial(base.weight, config=claims.config)
    return Adapter(
        name=name,
        config=claims.config,
        modules=dict(sorted(claims.modules.items())),
        extras=dict(sorted(claims.extras.items())),
        tensors=tensors,
        source=source,
        notes=(*claims.notes, *_ignored(claims.ignored.values())),
        dialect=dialect.name,
        base=weight,
    )


def _ignored(reasons: Iterable[str]) -> list[str]:
    """One note for each reason for which tensors change nothing."""
    return [f"{n} tensors are {why}; ignored" for why, n in Counter(reasons).items() if why]


def save_adapter(
    adapter: Adapter, out: Path, *, force: bool = False, file_format: FileFormat | None = None
) -> None:
    """Write an adapter in the portable layout (scaling folded, one rank), whole or not at all.

    Args:
        adapter: What to write.
        out: The directory to make.
        force: Replace an adapter directory that is there.
        file_format: How to write it. Default: as its dialect does, where that has a format.

    Raises:
        OutputError: If it cannot be written; nothing is left behind.
        AdapterError: If the format cannot hold it.
    """
    plan = _portable(adapter, file_format or format_of([adapter]))
    save_output(
        out,
        plan,
        lambda writer: _fill(writer, adapter),
        lambda _: adapter.texts,
        force=force,
        inputs=adapter.files,
    )


def _portable(adapter: Adapter, file_format: FileFormat = PEFT) -> OutputPlan:
    """The portable layout of an adapter, at its own ranks."""
    return plan_output(
        [adapter],
        [AlignedModule(name, {0: spec}) for name, spec in adapter.modules.items()],
        {name: spec.rank for name, spec in adapter.modules.items()},
        dtype=widest_dtype(spec.dtype for spec in adapter.modules.values()),
        extras={name: (extra.dtype, extra.shape) for name, extra in adapter.extras.items()},
        file_format=file_format,
    )


def _fill(writer: Writer, adapter: Adapter) -> None:
    for name in adapter.modules:
        writer.add(name, adapter.stacks(name), adapter.read_bias(name))
    for name in adapter.extras:
        writer.add_extra(name, adapter.read_extra(name))
