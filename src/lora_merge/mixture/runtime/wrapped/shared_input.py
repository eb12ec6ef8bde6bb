"""What is computed once for modules that read the same tensor, handed out one by one."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lora_merge.mixture.runtime.call.passes import Pass, Waiting

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

    def take(
        self,
        passed: Pass,
        index: int,
        x: Tensor,
        compute: Callable[[Pass, Tensor, int, int], Sequence[P]],
    ) -> P:
        """What `compute(passed, x, start, stop)` gives for one of them; the others' parts wait.

        Args:
            passed: The pass; a module that is called outside of one shares with nobody.
            index: Which one.
            x: What it reads.
            compute: The same object whenever it means the same.
        """
        shares = self.together and passed.stage is not None
        if not shares or not (passed.each_alone or not torch.compiler.is_compiling()):
            return compute(passed, x, index, index + 1)[0]
        waiting = passed.waiting.get(self)
        if waiting is not None and waiting.compute is compute and index in waiting.parts:
            if waiting.x is x:
                part: P = waiting.parts.pop(index)
                if not waiting.parts:
                    del passed.waiting[self]
                return part
            self.together = False
            del passed.waiting[self]
            return compute(passed, x, index, index + 1)[0]
        parts = compute(passed, x, 0, self.count)
        rest = {i: part for i, part in enumerate(parts) if i != index}
        passed.waiting[self] = Waiting(x, compute, rest)
        return parts[index]
