"""One LoRA adapter: opened lazily, read module by module."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.references import Source, resolve
from lora_merge.files.tensor_file import TensorSource, refuse_non_finite


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
        from lora_merge.adapters.opening import open_adapter

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
