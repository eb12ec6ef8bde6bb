"""A recorder without a GPU: operations are noted with their tensors, and made again on them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a stream that is being captured does not allow: the host would have to wait for an answer.
_ASKS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal,
         torch.ops.aten.masked_select, torch.ops.aten.unique_dim}  # fmt: skip


class Tape(TorchDispatchMode):
    """Notes every operation; a replay makes them on the same memory, and runs none of our code."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _ASKS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **(kwargs or {}))
        self.made.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, before in self.made:
            for old, new in zip(
                tree_leaves(before), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """In the place of CUDA graphs."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def warm(self, call: Callable[[], Any]) -> Any:
        return call()

    def record(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        tape = Tape()
        with tape:
            result = call()
        for leaf in tree_leaves(result):  # until the replay nothing has run
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaf.fill_(torch.nan)
        self.tapes.append(tape)
        return result, tape.replay
