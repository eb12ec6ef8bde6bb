"""Weights of a base model, read one tensor at a time from its safetensors files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_merge.adapters import ModuleSpec, SafetensorsFile
from lora_merge.errors import AdapterError, SourceError


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model directory, opened; nothing but headers is read.

    Attributes:
        path: The directory.
        entries: Tensor name → (dtype code, shape).
        files: Tensor name → the file that has it.
    """

    path: Path
    entries: Mapping[str, tuple[str, tuple[int, ...]]]
    files: Mapping[str, SafetensorsFile]

    def read(self, name: str) -> Tensor:
        """One tensor as stored."""
        return self.files[name].read(name)

    def find(self, module: str) -> str | None:
        """Name of a module's weight, None if it is not there.

        A checkpoint may leave out the model's outermost name, or have one more than the adapter
        ("bert.encoder..." against "encoder..."), as transformers itself accepts.

        Raises:
            AdapterError: If several tensors could be meant.
        """
        module = module.removesuffix(".base_layer")
        wanted = f"{module}.weight"
        if wanted in self.entries:
            return wanted
        longer = [name for name in self.entries if name.endswith(f".{wanted}")]
        shorter = [name for name in self.entries if wanted.endswith(f".{name}")]
        shorter = [n for n in shorter if n.count(".") >= wanted.count(".") - 1 and "." in n[:-7]]
        found = longer or shorter
        if len(found) > 1:
            raise AdapterError(
                f"{self.path}: {module} could be {' or '.join(sorted(found)[:3])}",
                "is this the adapter's base model?",
            )
        return found[0] if found else None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open every safetensors file of a model directory.

    Raises:
        SourceError: If there is none.
        AdapterError: If a file is damaged.
    """
    shards = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not shards or not shards[0].is_file():
        raise SourceError(
            f"{path}: no .safetensors file there", "name the directory of a downloaded model"
        )
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    files: dict[str, SafetensorsFile] = {}
    for shard in shards:
        file = SafetensorsFile(shard, str(path))
        entries.update(file.entries())
        files.update(dict.fromkeys(file.entries(), file))
    return Checkpoint(path, entries, files)


def weight_of(checkpoint: Checkpoint, spec: ModuleSpec, *, transposed: bool) -> Tensor | None:
    """A module's base weight as (d_out, d_in), float32; None where the checkpoint lacks it.

    Args:
        checkpoint: The base model.
        spec: The adapted module; experts have no single weight and give None.
        transposed: Whether the base stores (in, out), as GPT-2 does.

    Raises:
        AdapterError: If the shapes do not belong together.
    """
    name = checkpoint.find(spec.name) if spec.form != "experts" else None
    if name is None:
        return None
    weight = checkpoint.read(name).to(torch.float32)
    if spec.form == "conv":
        weight = weight.flatten(1)
    elif spec.form == "embedding" or (transposed and spec.form == "linear"):
        weight = weight.mT
    if tuple(weight.shape) != (spec.d_out, spec.d_in):
        raise AdapterError(
            f"{checkpoint.path}: {name} is {list(weight.shape)}, the adapter's {spec.name} is "
            f"{[spec.d_out, spec.d_in]}",
            "name the adapter's own base model",
        )
    return weight
