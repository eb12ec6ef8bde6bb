"""New experts that know nothing yet, to be trained together with their gate (SMoRA, MeteoRA).

SMoRA (arXiv 2501.15103) trains one LoRA of rank r from scratch whose every rank is an expert; a
mixture of several new experts is the same with larger ones, and one behind fixed weights is a plain
LoRA.
"""

import zlib
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch

from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.config import parse_config
from lora_merge.adapters.dialects.spelling import PREFIX
from lora_merge.errors import MethodError
from lora_merge.files.tensor_file import TensorDict

_LARGEST_RANK = 1 << 16


def fresh_adapters(
    modules: Mapping[str, tuple[int, int]],
    rank: int,
    names: Sequence[str],
    *,
    base: str | None = None,
    seed: int = 0,
) -> list[Adapter]:
    """LoRA adapters as PEFT starts them: A uniform in +-1 / sqrt(d_in), B zero, scaling 1.

    Args:
        modules: Linear modules of the base and their (d_out, d_in).
        rank: Of every adapter in every module.
        names: One per adapter.
        base: Base model to name in the config.
        seed: Of A; an adapter's draws depend on its number and the module's name alone.

    Raises:
        MethodError: If there are no modules.
    """
    if not modules or not 1 <= rank <= _LARGEST_RANK:
        raise MethodError(
            f"{len(modules)} modules, rank {rank}: nothing to train",
            f"a rank from 1 to {_LARGEST_RANK}",
        )
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "base_model_name_or_path": base,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
    }
    adapters = []
    for number, name in enumerate(names):
        tensors = {}
        for module, (d_out, d_in) in modules.items():
            draw = zlib.crc32(f"{number} {module}".encode()) ^ (seed * 0x9E3779B1)
            random = torch.Generator().manual_seed(draw)
            a = (torch.rand(rank, d_in, generator=random) * 2 - 1) / sqrt(d_in)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a
            tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.zeros(d_out, rank)
        adapters.append(build_adapter(name, parse_config(config, name), TensorDict(tensors)))
    return adapters
