"""The base model's weights for recipes that meet them, streamed from the checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from lora_merge.adapters.units import BaseWeight
from lora_merge.errors import AdapterError
from lora_merge.files.checkpoint import Checkpoint
from lora_merge.files.tensor_file import DTYPES

# Entries of a block of rows: 32 MiB in float32.
_BLOCK = 1 << 23


class BaseModel(Protocol):
    """Where base weights come from, by the adapter's own module names."""

    def shape(self, module: str) -> tuple[int, ...] | None:
        """Shape of a module's weight as the base stores it; None where it has none."""
        ...

    def weight(self, module: str, *, transposed: bool) -> BaseWeight:
        """A module's weight as a (d_out, d_in) matrix."""
        ...


@dataclass(frozen=True, eq=False)
class CheckpointBase:
    """A base model on disk, known by its headers.

    Attributes:
        checkpoint: The model's directory.
    """

    checkpoint: Checkpoint

    def shape(self, module: str) -> tuple[int, ...] | None:
        """Shape of a module's weight as stored; None where the checkpoint has none."""
        name = self._find(module)
        return None if name is None else self.checkpoint.tensors[name].shape

    def weight(self, module: str, *, transposed: bool) -> BaseWeight:
        """A module's weight, read when it is used.

        Args:
            module: The adapter's name for it.
            transposed: Whether the base stores (in, out), as GPT-2 does.

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
        return StreamedWeight(self.checkpoint, name, transposed)

    def _find(self, module: str) -> str | None:
        """A weight's name by a module's path, or by kohya's flattened form of it."""
        found = self.checkpoint.find(module)
        if found is not None or "." in module:
            return found
        ends = [f for f in self._flattened if module.endswith("_" + f) or module == f]
        longest = max(ends, key=len, default=None)
        return None if longest is None else self._flattened[longest]

    @cached_property
    def _flattened(self) -> dict[str, str]:
        weights = [n for n in self.checkpoint.tensors if n.endswith(".weight")]
        return {name.removesuffix(".weight").replace(".", "_"): name for name in weights}


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
