"""Which implementation of the mixtures' runtime is fastest on this machine."""

import torch

from lora_merge.api.arguments.tuning import Tune
from lora_merge.api.inputs import opened_mixture
from lora_merge.arguments import takes
from lora_merge.errors import ArgumentError
from lora_merge.files.targets import check_parent
from lora_merge.kernels.gated_stack import tune as tuning
from lora_merge.kernels.gated_stack import tune_cases
from lora_merge.kernels.gated_stack.dispatch import device_name, table_path
from lora_merge.machine.device import pick_device
from lora_merge.mixture.runtime.fit_to_model import stack_shapes
from lora_merge.planning import counted


@takes(Tune)
def tune(given: Tune) -> list[tuning.Measured]:
    """Time every implementation of the gated stack, and remember the fastest for each case.

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
    place = pick_device(given.device)
    if given.graph and place.type != "cuda":
        raise ArgumentError("graph times CUDA graphs, and there is no GPU here", "leave it out")
    if not given.dry_run:
        check_parent(table_path(device_name(place)), "set XDG_CACHE_HOME to a writable place")
    shapes = tune_cases.llama_shapes(given.experts, given.rank)
    if given.mixture is not None:
        shapes = stack_shapes(opened_mixture(given.mixture))
    usual = "bfloat16" if place.type == "cuda" else "float32"
    kind, tokens = getattr(torch, given.dtype or usual), given.tokens or (1, 16, 256)
    step = counted(given.progress, "cases", 3 * len(shapes) * len(tokens))
    rows = []
    for row in tuning.tune(
        shapes, place, kind, tokens=tokens, rounds=given.rounds, graph=given.graph
    ):
        rows.append(row)
        step()
    if not given.dry_run:
        tuning.store(rows, place)
    return rows
