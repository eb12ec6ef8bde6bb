"""The base model's weights for recipes that meet them, streamed from the checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.module_names import unwrapped
from lora_merge.adapters.units import BaseWeight
from lora_merge.errors import AdapterError
from lora_merge.files.checkpoint import Checkpoint
from lora_merge.files.tensor_file import DTYPES

# Entries of a block of rows: 32 MiB in float32.
_BLOCK = 1 << 23
_MULTIMODAL = ("language_model.model", "model.language_model")


class BaseModel(Protocol):
    """Where base weights come from, by the adapter's own module names."""

    def shape(self, module: str) -> tuple[int, ...] | None:
        """Shape of a module's weight as the base stores it; None where it has none."""
        ...

    def weight(self, module: str, *, config: AdapterConfig) -> BaseWeight:
        """A module's weight as a (d_out, d_in) matrix."""
        ...

    def has_bias(self, module: str) -> bool:
        """Whether a module has a bias beside its weight."""
        ...

    def near(self, module: str) -> tuple[str, ...]:
        """Modules of the base that a name it does not have may have meant."""
        ...

    def experts(self, stem: str) -> int | None:
        """How many experts stand below a path ("model.layers.0.mlp.experts")."""
        ...

    @property
    def kind(self) -> str:
        """The type of model, as its config says."""
        ...


def lies_transposed(checkpoint: Checkpoint, module: str, config: AdapterConfig) -> bool:
    """Whether a linear module's weight is stored as (in, out), as GPT-2's Conv1D is.

    PEFT's config says so, and a file without one does not: then the base itself does.
    """
    return config.fan_in_fan_out or checkpoint.is_conv1d(module)


@dataclass(frozen=True, eq=False)
class CheckpointBase:
    """A base model on disk, known by its headers.

    Attributes:
        checkpoint: The model's directory.
        renamed: What becomes of an adapter's name before it is looked for.
    """

    checkpoint: Checkpoint
    renamed: Callable[[str], str] = str

    def shape(self, module: str) -> tuple[int, ...] | None:
        """Shape of a module's weight as stored; None where the checkpoint has none."""
        name = self._find(module)
        return None if name is None else self.checkpoint.tensors[name].shape

    def weight(self, module: str, *, config: AdapterConfig) -> BaseWeight:
        """A module's weight, read when it is used.

        Args:
            module: The adapter's name for it.
            config: The adapter's.

        Raises:
            AdapterError: If there is none, or it is quantised.
        """
        name = self._find(module)
        if name is None:
            raise AdapterError(
                f"{self.checkpoint.folder} has no weight for {module}",
                "name the adapter's own base model",
            )
        if self.checkpoint.tensors[name].dtype not in DTYPES:
            raise AdapterError(
                f"{self.checkpoint.folder}: {name} is {self.checkpoint.tensors[name].dtype}",
                "name the unquantised model",
            )
        transposed = lies_transposed(self.checkpoint, name.removesuffix(".weight"), config)
        return StreamedWeight(self.checkpoint, name, transposed)

    def has_bias(self, module: str) -> bool:
        """Whether a module has a bias beside its weight."""
        name = self._find(module)
        return name is not None and f"{name.removesuffix('weight')}bias" in self.checkpoint.tensors

    def near(self, module: str) -> tuple[str, ...]:
        """Modules of the base that a name it does not have may have meant."""
        names = [n.removesuffix(".weight") for n in self.checkpoint.tensors]
        leaf = module.rpartition(".")[2]
        alike = [name for name in names if name.rpartition(".")[2] == leaf]
        return tuple(get_close_matches(self.renamed(module), alike or names, n=2, cutoff=0.5))

    def experts(self, stem: str) -> int | None:
        """How many experts stand below a path; None where there are none."""
        stem = self.renamed(stem)
        stems = {f"{one}.": 1 for name in _spellings(stem) for one in _old_and_new(name)}
        below = [
            (name.removeprefix(one).split("."), place.shape)
            for name, place in self.checkpoint.tensors.items()
            for one in stems
            if name.startswith(one)
        ]
        stacked = {shape[0] for _, shape in below if len(shape) == 3}
        if stacked:
            return max(stacked)
        apart = {int(parts[0]) for parts, _ in below if parts[0].isdigit()}
        return max(apart) + 1 if apart else None

    @property
    def kind(self) -> str:
        """The type of model, as its config says."""
        return str(self.checkpoint.config.get("model_type", ""))

    def _find(self, module: str) -> str | None:
        """A weight's name by a module's path, or by kohya's flattened form of it."""
        module = unwrapped(self.renamed(module))
        tried = (self.checkpoint.find(name) for name in _spellings(module))
        found = next((name for name in tried if name is not None), None)
        if found is not None or "." in module:
            return found
        ends = [f for f in self._flattened if module.endswith("_" + f) or module == f]
        longest = max(ends, key=len, default=None)
        return None if longest is None else self._flattened[longest]

    @cached_property
    def _flattened(self) -> dict[str, str]:
        weights = [n for n in self.checkpoint.tensors if n.endswith(".weight")]
        return {name.removesuffix(".weight").replace(".", "_"): name for name in weights}


def _spellings(name: str) -> Iterator[str]:
    """A name, and what it is in a multimodal model since, or before, transformers 4.52."""
    yield name
    for old, new in (_MULTIMODAL, _MULTIMODAL[::-1]):
        if name.startswith(old + "."):
            yield new + name.removeprefix(old)


def _old_and_new(stem: str) -> tuple[str, ...]:
    """Where experts stand, in transformers 5 and in Mixtral's own files."""
    old, new = "block_sparse_moe.experts", "mlp.experts"
    return stem, stem.replace(new, old), stem.replace(old, new)


@dataclass(frozen=True, eq=False)
class StreamedWeight:
    """One weight of a checkpoint as a (d_out, d_in) matrix, read in blocks of stored rows.

    Attributes:
        checkpoint: The model.
        name: The tensor.
        transposed: Whether it is stored as (in, out).
    """

    checkpoint: Checkpoint
    name: str
    transposed: bool

    @property
    def _stored(self) -> tuple[int, int]:
        shape = self.checkpoint.tensors[self.name].shape
        return shape[0], prod(shape[1:])

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in); a convolution's kernel positions are columns."""
        rows, columns = self._stored
        return (columns, rows) if self.transposed else (rows, columns)

    def times(self, x: Tensor) -> Tensor:
        """W @ x, float32."""
        return self._down(x.float()) if self.transposed else self._across(x.float())

    def transposed_times(self, x: Tensor) -> Tensor:
        """W.T @ x, float32."""
        return self._across(x.float()) if self.transposed else self._down(x.float())

    def dense(self) -> Tensor:
        """All of W, float32."""
        whole = torch.cat([block for _, block in self._blocks()])
        return whole.mT if self.transposed else whole

    def _across(self, x: Tensor) -> Tensor:
        """The stored matrix times x."""
        return torch.cat([block @ x for _, block in self._blocks()])

    def _down(self, x: Tensor) -> Tensor:
        """The stored matrix's transpose times x."""
        total = torch.zeros(self._stored[1], x.shape[1])
        for start, block in self._blocks():
            total += block.mT @ x[start : start + len(block)]
        return total

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows as float32) of the stored matrix."""
        place = self.checkpoint.tensors[self.name]
        rows, columns = self._stored
        step = max(1, _BLOCK // columns)
        with (self.checkpoint.folder / place.shard).open("rb") as file:
            for start in range(0, rows, step):
                count = min(step, rows - start)
                block = place.read(file, start * columns, count * columns)
                yield start, block.view(count, columns).float()
