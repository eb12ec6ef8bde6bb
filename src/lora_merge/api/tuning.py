"""The mixtures' runtime on this machine: which implementation is fastest, which kernels compile."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lora_merge.api.arguments.tuning import CheckKernels, Tune
from lora_merge.api.inputs import opened_mixture
from lora_merge.arguments import takes
from lora_merge.errors import ArgumentError, MethodError
from lora_merge.files.targets import check_parent
from lora_merge.kernels.gated_stack import tune as tuning
from lora_merge.kernels.gated_stack import tune_cases
from lora_merge.kernels.gated_stack.dispatch import device_name, table_path
from lora_merge.machine.device import pick_device
from lora_merge.mixture.runtime.fit_to_model import stack_shapes
from lora_merge.planning import counted
from lora_merge.printing import Report, Summary

if TYPE_CHECKING:
    from lora_merge.kernels.gated_stack.gpu.compile_check import Compiled


@dataclass(frozen=True, repr=False)
class KernelCheck(Report):
    """Which kernels a Triton compiles.

    Attributes:
        triton: Its version.
        capabilities: For which GPUs: ten times their compute capability.
        launches: Every kernel with every tile, gate and dtype that it can be asked for.
    """

    triton: str
    capabilities: tuple[int, ...]
    launches: "tuple[Compiled, ...]"

    @property
    def failed(self) -> "tuple[Compiled, ...]":
        """What does not compile."""
        return tuple(one for one in self.launches if one.error)

    def summary(self) -> Summary:
        """How many of what."""
        kernels = dict.fromkeys(one.kernel for one in self.launches)
        counts = {name: sum(one.kernel == name for one in self.launches) for name in kernels}
        facts = [("triton", self.triton)]
        facts += [(name, f"{count} launches") for name, count in counts.items()]
        facts += [("fails", f"{one.kernel}: {one.error}"[:200]) for one in self.failed[:4]]
        return Summary(f"{len(self.launches) - len(self.failed)} launches compile", tuple(facts))

    def rows(self) -> list[dict[str, Any]]:
        """One row per launch."""
        return [one.to_dict() for one in self.launches]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "schema": 1,
            "triton": self.triton,
            "capabilities": list(self.capabilities),
            "compiled": len(self.launches) - len(self.failed),
            "failed": [one.to_dict() for one in self.failed],
        }


@takes(CheckKernels)
def check_kernels(given: CheckKernels) -> KernelCheck:
    """Compile every kernel of the gated stack, for this GPU or the usual ones; no GPU is needed.

    Returns:
        What the compiler made of each launch.

    Raises:
        MethodError: If there is nothing to compile with; mixtures run eager there.

    Examples:
        >>> import lora_merge
        >>> lora_merge.check_kernels(device="cuda:99")
        Traceback (most recent call last):
        lora_merge.errors.MethodError: ...
    """
    place = pick_device(given.device)
    from lora_merge.kernels.gated_stack.gpu.fused import HAS_TRITON

    reason = "" if HAS_TRITON else "triton is not installed"
    if HAS_TRITON:
        from lora_merge.kernels.gated_stack.gpu import compile_check as checking

        reason = checking.refusal()
    if reason:
        raise MethodError(f"no kernel can be compiled: {reason}", "mixtures run eager here")
    done, targets = [], checking.targets(place)
    for capability in targets:
        found = checking.chosen(capability)
        step = counted(given.progress, f"compute capability {capability / 10}", len(found))
        for one in checking.compile_all(found, capability):
            done.append(one)
            step()
    return KernelCheck(checking.triton_version(), targets, tuple(done))


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
