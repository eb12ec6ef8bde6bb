"""Several processes that train one gate: `accelerate launch`, torchrun, or a group of one's own.

Every process sees its share of each batch and the gradients are added up, so that the result is
that of one process with the whole batch, but for rounding. There is no wrapper around the model:
what trains is small and lies outside the base, which may itself be sharded (FSDP).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from lora_merge.errors import LoraMergeError


@dataclass(frozen=True)
class Processes:
    """The processes that train together.

    Attributes:
        rank: Which one this is; 0 alone writes.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Processes":
        """Those of torch.distributed's default group, or this one alone."""
        if not distributed.is_available() or not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one message per dtype."""
        if self.count == 1:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            part = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.flatten() for t in part])
            distributed.all_reduce(flat)
            pieces = flat.split([t.numel() for t in part])
            for tensor, piece in zip(part, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))

    def follow_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the first process's: equal work may round otherwise elsewhere."""
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.data, src=0)

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            distributed.barrier()


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process is the one that writes, as the launcher says."""
    return os.environ.get("RANK", "0") == "0"


def join(*, cpu: bool) -> torch.device:
    """Join the processes that a launcher started; returns this one's device.

    Args:
        cpu: Stay on the CPU.

    Raises:
        LoraMergeError: If accelerate is not installed.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise LoraMergeError(
            "several processes need accelerate", "pip install 'lora-merge[accelerate]'"
        ) from error
    device: torch.device = PartialState(cpu=cpu).device
    return device


def leave() -> None:
    """Take leave of the other processes."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread a base model over the processes (FSDP2): each holds its share of every layer.

    The mixture is attached afterwards and is whole in every process.

    Args:
        model: On the CPU; its shares move to the device.
        device: Of this process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    layers = getattr(model, "_no_split_modules", None) or ()  # transformers' decoder layers
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
