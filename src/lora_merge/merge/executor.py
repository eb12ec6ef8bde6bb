"""Run a plan: modules stream from the files through the method to the writer."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.alignment import read_stacks
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.adapters.writer import Writer
from lora_merge.errors import MethodError, NotFiniteError
from lora_merge.files.tensor_stream import cast_to
from lora_merge.machine.device import own_stream, pick_device, workers_on
from lora_merge.machine.parallel import in_order
from lora_merge.merge.calibrate import present_weights
from lora_merge.merge.methods.method import Job
from lora_merge.merge.module_work import gram_dtype, stack_dtype
from lora_merge.merge.pipeline import (
    Decomposed,
    Finished,
    Merged,
    finish,
    merge_stack,
    prepare_view,
)
from lora_merge.merge.plan import MergePlan
from lora_merge.merge.report import ModuleReport
from lora_merge.merge.waiting_results import Spool
from lora_merge.ranks.choose import choose_ranks

_LOG = logging.getLogger(__name__)


def execute(
    plan: MergePlan,
    writer: Writer,
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
        writer: Receives the results.
        jobs: Worker threads; default: the CPUs this process may use; on a GPU four, each with a
            stream of its own, or fewer if its memory does not hold so many modules.
        device: "cpu", "cuda", "cuda:1" or "auto".
        on_module: Called with each report, in module order.

    Raises:
        AdapterError: If a tensor is not finite.
    """
    place = pick_device(device)
    workers = workers_on(place, jobs, plan.peak_bytes(1))
    shared = prepare(plan, place, workers)
    work = partial(_write_module, plan, writer, place, shared)
    reports = []
    for report in in_order(work, plan.alignment.modules, jobs=workers):
        reports.append(report)
        _LOG.debug("%s done, rank %d", report.name, report.rank)
        if on_module:
            on_module(report)
    _merge_extras(plan, writer)
    return reports


def merged_modules(plan: MergePlan, device: torch.device) -> Iterator[Finished]:
    """Every module's (expert's) result at the plan's rank, written nowhere."""
    shared = prepare(plan, device, 1)
    for module in plan.alignment.modules:
        rank = None if plan.measured else plan.ranks[module.name]
        for merged in _merge(plan, module, device, shared):
            yield finish(merged, rank, exact=plan.semantics.exact)


def settle(
    plan: MergePlan,
    folder: Path,
    *,
    jobs: int | None = None,
    device: str = "auto",
    on_module: Callable[[str], None] | None = None,
) -> MergePlan:
    """First pass of a plan whose ranks depend on the results: merge, spool, choose ranks.

    Args:
        plan: What to do.
        folder: An existing folder for the spooled results.
        jobs: Worker threads.
        device: Where to compute.
        on_module: Called with the name of each module that is done.

    Returns:
        The plan with its ranks, for `execute`.
    """
    spool = Spool((folder,))
    compute(plan, spool, plan.alignment.modules, jobs=jobs, device=device, on_module=on_module)
    return plan.with_ranks(chosen_ranks(plan, spool), spool)


def compute(
    plan: MergePlan,
    spool: Spool,
    modules: Sequence[AlignedModule],
    *,
    extras: Sequence[str] = (),
    jobs: int | None = None,
    device: str = "auto",
    on_module: Callable[[str], None] | None = None,
) -> None:
    """Merge some modules of a plan, and leave the results on disk.

    Args:
        plan: What to do.
        spool: Where the results wait.
        modules: Some of the plan's.
        extras: Names of some of the plan's tensors that are not factors.
        jobs: Worker threads.
        device: Where to compute.
        on_module: Called with the name of each module that is done.
    """
    place = pick_device(device)
    workers = workers_on(place, jobs, plan.peak_bytes(1))
    shared = prepare(plan, place, workers)
    work = partial(_spool_module, plan, spool, place, shared)
    for name in in_order(work, modules, jobs=workers):
        if on_module:
            on_module(name)
    for name in extras:
        spool.put_extra(name, cast_to(_mean_extra(plan, name), plan.output.extras[name][0], name))


def chosen_ranks(plan: MergePlan, spool: Spool) -> dict[str, int]:
    """What the plan's rank rule makes of all results together."""
    modules = {m.name: m for m in plan.alignment.modules}
    if plan.rule.kind == "units":
        return {name: spool.units(name) for name in modules}
    costs = {
        name: (m.first.d_in + m.first.d_out) * m.first.num_experts for name, m in modules.items()
    }
    spectra = {name: spool.spectrum(name) for name in modules}
    return choose_ranks(spectra, costs, plan.rule, before=plan.ranks, max_rank=None).ranks


def _stacks(
    plan: MergePlan, module: AlignedModule, device: torch.device, shared: Any
) -> Iterator[tuple[RankStack, Job]]:
    """A module's stacks and what the method is told of each."""
    weights = torch.tensor(plan.weights_at(module.name), dtype=torch.float64, device=device)
    names = tuple(a.name for a in plan.alignment.adapters)
    several = module.first.num_experts > 1
    statistics = plan.statistics.of(module.name, names) if plan.statistics else {}
    statistics = {key: tensor.to(device) for key, tensor in statistics.items()}
    dtype = stack_dtype(plan, module)
    stacks = read_stacks(plan.alignment, module, device=device, dtype=dtype)
    for expert, stack in enumerate(stacks):
        yield (
            stack,
            Job(
                module=f"{module.name}[{expert}]" if several else module.name,
                rank=plan.ranks[module.name] if plan.rule.kind == "fixed" else None,
                weights=weights,
                seed=plan.recipe.seed,
                own=plan.own_at(module.name),
                shared=shared,
                statistics=statistics,
            ),
        )


def _merge(
    plan: MergePlan, module: AlignedModule, device: torch.device, shared: Any
) -> Iterator[Merged]:
    for stack, job in _stacks(plan, module, device, shared):
        # Who needs the Grams of the stack shares them: they are computed first.
        precise = gram_dtype(plan, module)
        stack = stack if precise is None else stack.measured(precise)
        yield merge_stack(stack, job, plan.method, plan.options, plan.semantics)


def _write_module(
    plan: MergePlan, writer: Writer, device: torch.device, shared: Any, module: AlignedModule
) -> ModuleReport:
    rank = plan.ranks[module.name]
    with own_stream(device), _overflow_named(plan, module):
        if plan.spool is not None:
            results, bias = plan.spool.take(module.name, rank)
        else:
            merged = _merge(plan, module, device, shared)
            cut = partial(finish, rank=rank, exact=plan.semantics.exact)
            results, bias = [_on_cpu(cut(m)) for m in merged], _merge_bias(plan, module)
        writer.add(module.name, [r.stack for r in results], bias)
        return _report(module, rank, results)


def _spool_module(
    plan: MergePlan, spool: Spool, device: torch.device, shared: Any, module: AlignedModule
) -> str:
    uncut, rank = plan.rule.kind == "units", plan.ranks[module.name]
    with own_stream(device), _overflow_named(plan, module):
        results: list[Decomposed | Finished] = []
        for merged in _merge(plan, module, device, shared):
            if plan.measured:
                results.append(merged.whole() if uncut else merged.decomposed())
            else:
                results.append(finish(merged, rank, exact=plan.semantics.exact))
        spool.put(module.name, results, _merge_bias(plan, module))
    return module.name


def _on_cpu(result: Finished) -> Finished:
    """What is done to a result before it is written is done there, whoever computed it."""
    stack = result.stack
    if stack.up.device.type == "cpu":
        return result
    moved = (part.cpu() for part in (stack.down, stack.up, stack.scale, stack.owner))
    return replace(result, stack=RankStack(*moved))


@contextmanager
def _overflow_named(plan: MergePlan, module: AlignedModule) -> Iterator[None]:
    """Say which adapter made a module's numbers leave their range.

    Every tensor is finite when it is read, so it is a product of it with weight and scaling, or of
    two of them, that is not.
    """
    try:
        yield
    except (LinAlgError, OverflowError, NotFiniteError) as error:
        weights = plan.weights_at(module.name)
        sizes = {}
        for index, spec in module.specs.items():
            a, b = plan.alignment.adapters[index].read(module.name)
            largest = float(a.abs().max().double() * b.abs().max().double())
            sizes[index] = abs(float(weights[index]) * spec.scaling) * largest
        index = max(sizes, key=lambda one: sizes[one])
        name, scaling = plan.alignment.adapters[index].name, module.specs[index].scaling
        raise MethodError(
            f"{module.name}: the merged delta is beyond the range of its numbers; the largest "
            f"part is {name}'s: weight {weights[index]:.3g}, scaling {scaling:.3g}, entries of "
            f"B @ A up to {sizes[index]:.3g} with both",
            f"lower the weight of {name} or --scale, or leave the adapter out if it is damaged",
        ) from error


def _report(module: AlignedModule, rank: int, results: list[Finished]) -> ModuleReport:
    exact_square = sum(r.exact_norm**2 for r in results)
    doubts = sum((r.exact_norm * r.exact_error) ** 2 for r in results)
    square, cross = sum(r.square for r in results), sum(r.cross for r in results)
    before = sum(r.full_square for r in results)
    squares = zip(*(r.adapter_squares for r in results), strict=True)
    details = [dict(r.details) for r in results]
    return ModuleReport(
        name=module.name,
        num_units=module.num_units,
        rank=rank,
        exact_norm=sqrt(max(exact_square, 0)),
        norm=sqrt(max(square, 0)),
        error_norm=sqrt(max(exact_square + square - 2 * cross, 0)),
        details={"experts": details} if len(results) > 1 else details[0],
        full_norm=sqrt(max(before, 0)),
        adapter_norms=tuple(sqrt(max(sum(s), 0)) for s in squares),
        exact_norm_error=sqrt(doubts / exact_square) if exact_square else 0.0,
    )


def prepare(plan: MergePlan, device: torch.device, jobs: int) -> Any:
    """What the method wants to know of all modules together before the first is merged."""
    if plan.method.prepare is None or plan.spool is not None:
        return None
    if plan.shared is not None:
        return plan.shared

    def survey(visit: Callable[[RankStack, Job], None]) -> None:
        def work(module: AlignedModule) -> None:
            with own_stream(device):
                for stack, job in _stacks(plan, module, device, None):
                    visit(*prepare_view(stack, job, plan.method, plan.semantics))

        for _ in in_order(work, plan.alignment.modules, jobs=jobs):
            pass

    return plan.method.prepare(survey, plan.options)


def _merge_bias(plan: MergePlan, module: AlignedModule) -> Tensor | None:
    """The exact weighted sum of scaling * bias (`lora_bias`), float64, shape (d_out,)."""
    total = None
    how = plan.semantics.normalize or plan.method.normalize
    raw = torch.tensor(plan.weights_at(module.name), dtype=torch.float64)
    weights = present_weights(raw, list(module.specs), how, module.name) * plan.semantics.factor
    for index in module.specs:
        bias = plan.alignment.adapters[index].read_bias(module.name)
        if bias is not None:
            part = bias * weights[index]
            total = part if total is None else total + part
    return total


def _merge_extras(plan: MergePlan, writer: Writer) -> None:
    """Write each tensor that is not a factor."""
    for name in plan.extras:
        waiting = None if plan.spool is None else plan.spool.extra(name)
        writer.add_extra(name, _mean_extra(plan, name) if waiting is None else waiting)


def _mean_extra(plan: MergePlan, name: str) -> Tensor:
    """The mean of a tensor over the adapters that the plan chose for it, float64."""
    owners = plan.extras[name]
    total = owners[0].read_extra(name).double()
    for owner in owners[1:]:
        total = total + owner.read_extra(name).double()
    return total / len(owners)
