"""Run a plan: modules stream from the files through the method to the sink."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

from lora_merge.adapters import AlignedModule, RankStack, read_stacks
from lora_merge.errors import MethodError
from lora_merge.merge.plan import MergePlan
from lora_merge.merge.registry import Job, Outcome
from lora_merge.merge.report import ModuleReport


class Sink(Protocol):
    """Where results go; `AdapterWriter` is one. Called from several threads."""

    def add(self, module: str, results: list[RankStack], bias: Tensor | None = None) -> None:
        """Take one module: one result per expert, and B's merged bias if there is one."""
        ...

    def add_extra(self, name: str, tensor: Tensor) -> None:
        """Take a tensor that is not a factor."""
        ...


def execute(
    plan: MergePlan,
    sink: Sink,
    *,
    jobs: int | None = None,
    device: str = "auto",
    on_module: Callable[[ModuleReport], None] | None = None,
) -> list[ModuleReport]:
    """Merge every module of a plan.

    Each module is computed by one thread with one BLAS thread, so the result is the same bytes for
    any number of jobs; parallelism is across modules.

    Args:
        plan: What to do.
        sink: Receives the results.
        jobs: Worker threads; default: the CPUs this process may use (one on a GPU).
        device: "cpu", "cuda", "cuda:1" or "auto".
        on_module: Called with each report, in module order.

    Raises:
        AdapterError: If a tensor is not finite.
    """
    place = pick_device(device)
    workers = jobs or (default_jobs() if place.type == "cpu" else 1)
    reports = []
    with _one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[ModuleReport]] = deque()
        modules = iter(plan.alignment.modules)
        try:
            while True:
                # One module per worker and one more, so memory stays bounded and nobody waits.
                while len(waiting) <= workers and (module := next(modules, None)):
                    waiting.append(pool.submit(_merge_module, plan, module, sink, place))
                if not waiting:
                    break
                reports.append(waiting.popleft().result())
                if on_module:
                    on_module(reports[-1])
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    _merge_extras(plan, sink)
    return reports


def pick_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is a GPU if there is one.

    Raises:
        MethodError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MethodError(f"{name!r} is no device", "use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MethodError("there is no CUDA device here", "use --device cpu")
    return device


def default_jobs() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _merge_module(
    plan: MergePlan, module: AlignedModule, sink: Sink, device: torch.device
) -> ModuleReport:
    weights = torch.tensor(plan.weights, dtype=torch.float64, device=device)
    results = []
    exact_square = square = cross = 0.0
    adapter_squares = torch.zeros(len(plan.weights), dtype=torch.float64)
    details: list[dict[str, object]] = []
    several = module.first.num_experts > 1
    for expert, stack in enumerate(read_stacks(plan.alignment, module, device=device)):
        name = f"{module.name}[{expert}]" if several else module.name
        job = Job(name, plan.ranks[module.name], weights, plan.seed)
        # The report needs both Grams of the stack; computed first, the method shares them.
        _ = stack.gram_down, stack.gram_up
        exact = stack.weighted(weights)
        outcome = plan.method.run(stack, job, plan.options)
        results.append(outcome.stack)
        between = exact.adapter_products().cpu()
        exact_square += float(between.sum())
        adapter_squares[: len(between)] += between.diagonal()
        products = _products(exact, outcome)
        square, cross = square + products[0], cross + products[1]
        details.append(dict(outcome.details))
    sink.add(module.name, results, _merge_bias(plan, module))
    return ModuleReport(
        name=module.name,
        num_units=module.num_units,
        rank=plan.ranks[module.name],
        exact_norm=sqrt(max(exact_square, 0)),
        norm=sqrt(max(square, 0)),
        error_norm=sqrt(max(exact_square + square - 2 * cross, 0)),
        adapter_norms=tuple(adapter_squares.clamp_min(0).sqrt().tolist()),
        details={"experts": details} if several else details[0],
    )


def _products(exact: RankStack, outcome: Outcome) -> tuple[float, float]:
    """<result, result> and <exact, result>, from the exact stack's Grams where the mixes allow."""
    result = outcome.stack
    if outcome.mixes is None:
        return result.inner(result), exact.inner(result)
    down_mix, up_mix = outcome.mixes
    down, up = down_mix @ exact.gram_down, up_mix @ exact.gram_up
    square = result.scale @ ((down @ down_mix.mT) * (up @ up_mix.mT)) @ result.scale
    return float(square.item()), float((result.scale @ (down * up) @ exact.scale).item())


def _merge_bias(plan: MergePlan, module: AlignedModule) -> Tensor | None:
    """The exact weighted sum of scaling * bias (`lora_bias`), float32, shape (d_out,)."""
    total = None
    for index, spec in module.specs.items():
        if spec.key_bias:
            bias = plan.alignment.adapters[index].tensors.read(spec.key_bias).double()
            part = bias * (spec.scaling * plan.weights[index])
            total = part if total is None else total + part
    return None if total is None else total.float()


def _merge_extras(plan: MergePlan, sink: Sink) -> None:
    """Average each tensor that is not a factor over the adapters the plan chose for it."""
    for name, owners in plan.extras.items():
        total = owners[0].read_extra(name).double()
        for owner in owners[1:]:
            total = total + owner.read_extra(name).double()
        sink.add_extra(name, total / len(owners))


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
