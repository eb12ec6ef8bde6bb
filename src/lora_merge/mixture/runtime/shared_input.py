"""What is computed once for modules that read the same tensor, handed out one by one."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

P = TypeVar("P")


class Siblings:
    """Modules that are believed to read one tensor: q, k and v, gate and up.

    That they do is checked by identity at every call, never assumed: a cross-attention, whose k and
    v read another tensor than q, is separated at its first call.

    Args:
        count: How many there are.

    Attributes:
        together: Whether they have read the same tensor so far.
    """

    def __init__(self, count: int) -> None:
        self.count, self.together = count, count > 1
        self._x: Tensor | None = None
        self._compute: object = None
        self._parts: dict[int, Any] = {}

    def take(self, index: int, x: Tensor, compute: Callable[[Tensor, int, int], Sequence[P]]) -> P:
        """What `compute(x, start, stop)` gives for one of them; the others' parts wait for them.

        Args:
            index: Which one.
            x: What it reads.
            compute: The same object whenever it means the same.
        """
        if not self.together or torch.compiler.is_compiling():
            return compute(x, index, index + 1)[0]
        if self._compute is compute and index in self._parts:
            if self._x is x:
                part: P = self._parts.pop(index)
                if not self._parts:
                    self.release()
                return part
            self.together = False
            self.release()
            return compute(x, index, index + 1)[0]
        parts = compute(x, 0, self.count)
        self._x, self._compute = x, compute
        self._parts = {i: part for i, part in enumerate(parts) if i != index}
        return parts[index]

    def release(self) -> None:
        """Drop what waits for a module that was not called."""
        self._x, self._compute, self._parts = None, None, {}
