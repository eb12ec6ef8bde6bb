"""One wrapped module, ready to run."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_merge.kernels.gated_stack.eager import shrink_conv, shrink_embedding, shrink_linear

# Modules that may read what an encoder made.
_CROSS = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention|attn2)\..*"
    r"\b(k|v|k_proj|v_proj|key|value|to_k|to_v)$"
)


@dataclass(frozen=True, eq=False)
class Member:
    """One wrapped module, ready to run.

    Attributes:
        name: Module path in the base model.
        number: Its place among all wrapped modules.
        form: "linear", "embedding" or "conv".
        down: Shape (R, d_in).
        up: B^T rows with the scaling folded in, shape (R, d_out).
        owner: Expert of each unit, non-decreasing.
        experts: The gated experts present in this module, ascending.
        general: The general experts present (GenKnowSub); numbered after all gated ones.
        rows: Gate rows, shape (scores, d_in), or None.
        bias: Selection bias of a rank gate, shape (R,), or None.
        spectrum: Singular value of each unit, shape (R,), for the `spectrum` signal, or None.
        kernel: Kernel shape of a convolution.
        how: Stride, padding and dilation of a convolution.
        output_scale: What the base module multiplies its output by (scaled embeddings).
    """

    name: str
    number: int
    form: str
    down: Tensor
    up: Tensor
    owner: tuple[int, ...]
    experts: tuple[int, ...]
    general: tuple[int, ...] = ()
    rows: Tensor | None = None
    bias: Tensor | None = None
    spectrum: Tensor | None = None
    kernel: tuple[int, ...] = ()
    how: dict[str, Any] = field(default_factory=dict)
    output_scale: float = 1.0

    @property
    def is_cross(self) -> bool:
        """Whether it may read what an encoder made, and not what its siblings read."""
        return _CROSS.search(self.name) is not None

    @property
    def shrink(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Products of an input with rows, as the form has it."""
        if self.form == "embedding":
            return shrink_embedding
        if self.form == "conv":
            return partial(shrink_conv, kernel=self.kernel, how=self.how)
        return shrink_linear

    def renumbered(self, numbers: Mapping[int, int], place: int) -> "Member":
        """Those of its experts that `numbers` has, under the numbers they have there.

        Args:
            numbers: Old number -> new, in the same order.
            place: Of the module among all wrapped ones.
        """
        if all(numbers.get(e) == e for e in (*self.experts, *self.general)):
            return replace(self, number=place)
        units = [unit for unit, owner in enumerate(self.owner) if owner in numbers]
        rows = [row for row, expert in enumerate(self.experts) if expert in numbers]
        return replace(
            self,
            number=place,
            down=self.down[units],
            up=self.up[units],
            owner=tuple(numbers[self.owner[unit]] for unit in units),
            experts=tuple(numbers[e] for e in self.experts if e in numbers),
            general=tuple(numbers[e] for e in self.general if e in numbers),
            rows=None if self.rows is None else self.rows[rows],
            spectrum=None if self.spectrum is None else self.spectrum[units],
        )


def joined(parts: Sequence[Member]) -> Member:
    """One module's member from parts of it, each with experts of its own, ascending."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return replace(
        first,
        down=torch.cat([part.down for part in parts]),
        up=torch.cat([part.up for part in parts]),
        owner=tuple(owner for part in parts for owner in part.owner),
        experts=tuple(expert for part in parts for expert in part.experts),
        general=tuple(expert for part in parts for expert in part.general),
        rows=_cat([part.rows for part in parts]),
        spectrum=_cat([part.spectrum for part in parts]),
    )


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if there else None
