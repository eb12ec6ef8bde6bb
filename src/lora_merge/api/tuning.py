"""Which implementation of the mixtures' runtime is fastest on this machine."""

import os
from collections.abc import Sequence
from typing import Literal

import torch

from lora_merge.arguments import checked
from lora_merge.errors import MethodError
from lora_merge.files.targets import check_parent
from lora_merge.kernels.gated_stack import tune as tuning
from lora_merge.kernels.gated_stack.dispatch import device_name, table_path
from lora_merge.kernels.gated_stack.tune_cases import llama_shapes
from lora_merge.machine.device import pick_device
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.fit_to_model import stack_shapes


@checked()
def tune(
    mixture: Mixture | str | os.PathLike[str] | None = None,
    *,
    experts: int = 8,
    rank: int = 16,
    tokens: Sequence[int] = (1, 16, 256),
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    device: str = "auto",
    rounds: int = 9,
    graph: bool = False,
    dry_run: bool = False,
) -> list[tuning.Measured]:
    """Time every implementation of the gated stack, and remember the fastest for each case.

    Args:
        mixture: Whose shapes; default: the modules of Llama-3-8B.
        experts: Without a mixture: how many.
        rank: Without a mixture: their rank.
        tokens: Token counts.
        dtype: Default: bfloat16 on a GPU, else float32.
        device: Where.
        rounds: How often each is timed.
        graph: Time CUDA graphs instead of separate launches.
        dry_run: Remember nothing.

    Raises:
        MethodError: If `graph` is asked for without a GPU.
        OutputError: If the table cannot be written.

    Examples:
        >>> import lora_merge
        >>> mixture = lora_merge.Mixture("examples/adapters/*")
        >>> rows = lora_merge.tune(mixture, device="cpu", tokens=[1], rounds=1, dry_run=True)
        >>> all(row.fastest for row in rows)
        True
    """
    place = pick_device(device)
    if graph and place.type != "cuda":
        raise MethodError("graph times CUDA graphs, and there is no GPU here", "leave it out")
    if not dry_run:
        check_parent(table_path(device_name(place)), "set XDG_CACHE_HOME to a writable place")
    shapes = llama_shapes(experts, rank)
    if mixture is not None:
        whole = mixture if isinstance(mixture, Mixture) else Mixture.from_pretrained(str(mixture))
        shapes = stack_shapes(whole)
    kind = getattr(torch, dtype or ("bfloat16" if place.type == "cuda" else "float32"))
    rows = list(tuning.tune(shapes, place, kind, tokens=tokens, rounds=rounds, graph=graph))
    if not dry_run:
        tuning.store(rows, place)
    return rows
