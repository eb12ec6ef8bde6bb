"""One wrapped module, ready to run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from lora_merge.kernels.gated_stack.eager import shrink_conv, shrink_embedding, shrink_linear


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
    def shrink(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Products of an input with rows, as the form has it."""
        if self.form == "embedding":
            return shrink_embedding
        if self.form == "conv":
            return partial(shrink_conv, kernel=self.kernel, how=self.how)
        return shrink_linear
