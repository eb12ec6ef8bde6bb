"""What a gate's activation is, as plain data: `gated_stack` computes it; commands describe it."""

from dataclasses import dataclass
from typing import Literal

Value = Literal["softmax", "softmax_all", "softmax_twice", "sigmoid", "raw", "binary"]


@dataclass(frozen=True)
class Rule:
    """A gate's activation, without its tensors.

    Attributes:
        value: Weights of the kept scores. `softmax` over the kept; `softmax_all` over all and then
            cut, not renormalised; `softmax_twice` over all, cut, and again over the kept;
            `sigmoid`, `raw` and `binary` entry by entry.
        top_k: How many scores are kept, the first of equal ones; None keeps all.
        temperature: Divides the scores before a softmax or sigmoid.
        factor: Multiplies every weight.
        absolute: Take the scores' absolute values first.
        null_row: The last score belongs to no expert; its weight is dropped.
        null_score: A constant score that belongs to no expert, or None.
    """

    value: Value = "softmax"
    top_k: int | None = None
    temperature: float = 1.0
    factor: float = 1.0
    absolute: bool = False
    null_row: bool = False
    null_score: float | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether most weights are zero."""
        return self.top_k is not None
