"""What is known of the texts that experts were made for; `novelty` says what for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_merge.adapters.module_names import natural

PARTS = ("mean", "basis", "error")


@dataclass(frozen=True, eq=False)
class Descriptors:
    """What is known about the inputs of some experts.

    Attributes:
        experts: Names of the described ones, in the order of the rows of every tensor.
        tensors: By module and part: `mean` (E, d), `basis` (E, k, d) with orthonormal rows, and
            `error` (E, 2), mean and deviation over texts of the expert's own.
    """

    experts: tuple[str, ...]
    tensors: dict[str, Tensor]

    @property
    def modules(self) -> list[str]:
        """Modules whose inputs are described."""
        return natural({name.rpartition(".")[0] for name in self.tensors})

    def errors(self, module: str, x: Tensor) -> Tensor:
        """Mean squared reconstruction error of tokens (T, d) by each expert, shape (E,)."""
        mean, basis = (self.tensors[f"{module}.{part}"].to(x) for part in PARTS[:2])
        away = x[None] - mean[:, None]
        left = away.square().sum(-1) - (away @ basis.mT).square().sum(-1)
        return left.clamp_min(0).mean(1)

    def with_expert(self, name: str, tensors: dict[str, Tensor]) -> "Descriptors":
        """With one expert's rows (no leading dimension) put last, or in place of its old ones."""
        kept = self._apart_from(name)
        grown = {
            key: torch.cat([self.tensors[key][kept], rows[None]]) if kept else rows[None]
            for key, rows in tensors.items()
        }
        return Descriptors((*(self.experts[i] for i in kept), name), grown)

    def without_expert(self, name: str) -> "Descriptors | None":
        """Those of the others; None if there are none."""
        kept = self._apart_from(name)
        tensors = {key: rows[kept] for key, rows in self.tensors.items()}
        return Descriptors(tuple(self.experts[i] for i in kept), tensors) if kept else None

    def _apart_from(self, name: str) -> list[int]:
        return [i for i, expert in enumerate(self.experts) if expert != name]
