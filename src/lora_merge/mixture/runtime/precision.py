"""Gates decide in float32, also in half-precision models: rounding would flip the top-k."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_HALVES = (torch.float16, torch.bfloat16)


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the gate of modules of a dtype computes in."""
    return dtype if dtype == torch.float64 else torch.float32


@contextmanager
def kept_precise(module: nn.Module, *names: str) -> Iterator[None]:
    """Undo what the block rounds of a gate's tensors, wherever it moves them.

    Args:
        module: What holds them.
        names: Its parameters or buffers; None among them is left alone.
    """
    before = {name: getattr(module, name) for name in names}
    kept = {name: t.detach() for name, t in before.items() if isinstance(t, Tensor)}
    yield
    for name, tensor in kept.items():
        now = getattr(module, name)
        if now.dtype in _HALVES and tensor.dtype not in _HALVES:
            now.data = tensor.to(now.device, gate_dtype(now.dtype))
