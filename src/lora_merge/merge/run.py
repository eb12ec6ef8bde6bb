"""Run a plan: into a directory, whole or not at all, or in memory."""

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from lora_merge._version import __version__
from lora_merge.adapters.in_memory import MadeAdapter, MemoryWriter
from lora_merge.adapters.writer import AdapterWriter
from lora_merge.errors import MethodError
from lora_merge.files.atomic import atomic_directory
from lora_merge.files.pages.cards import model_card
from lora_merge.merge.clusters import clusters_text
from lora_merge.merge.executor import execute, settle
from lora_merge.merge.plan import MergePlan
from lora_merge.merge.recipe.recipe import RECIPE_NAME
from lora_merge.merge.report import MergeReport, ModuleReport

# Below this share of energy kept, the result is not what the method made.
_LITTLE_ENERGY = 0.5

# Below this share of the mean, Model Stock has erased what it was to merge.
_SHRUNK = 0.1


def run_plan(
    plan: MergePlan,
    out: Path,
    *,
    force: bool = False,
    strict: bool = False,
    jobs: int | None = None,
    device: str = "auto",
    on_module: Callable[[ModuleReport], None] | None = None,
) -> MergeReport:
    """Merge into a directory that appears when everything is done.

    Args:
        plan: What to do; with its `spool`, what is there already.
        out: The directory to make.
        force: Replace an adapter directory that is there.
        strict: Treat it as an error if the cut to a rank lost most of the result.
        jobs: Worker threads.
        device: Where to compute.
        on_module: Called with each module's report.

    Raises:
        OutputError: If the directory cannot be written; nothing is left behind.
        AdapterError: If an input turns out damaged; nothing is left behind.
    """
    sources = [a.source for a in plan.alignment.adapters if a.source]
    inputs = [path for s in sources for path in (s.weights, s.config) if path]
    inputs += [plan.statistics.path] if plan.statistics else []
    needed = plan.output.num_bytes
    with atomic_directory(out, force=force, inputs=inputs, needed=needed) as folder:
        with ThreadPoolExecutor(1) as beside:
            resolved = beside.submit(plan.resolved_recipe)  # hashes the inputs meanwhile
            waiting = folder / ".spool"
            if plan.measured and plan.spool is None:
                waiting.mkdir()
                plan = settle(plan, waiting, jobs=jobs, device=device)
            with AdapterWriter(folder, plan.output) as writer:
                modules = execute(plan, writer, jobs=jobs, device=device, on_module=on_module)
            if waiting.exists():
                waiting.rmdir()
            text = f"# made by lora-merge {__version__}\n" + resolved.result().to_yaml()
        report = _finish_report(plan, modules, str(out), strict=strict)
        (folder / RECIPE_NAME).write_text(text + _members(plan, modules), encoding="utf-8")
        (folder / "README.md").write_text(_card(plan, text), encoding="utf-8")
    return report


def run_in_memory(
    plan: MergePlan, *, strict: bool = False, jobs: int | None = None, device: str = "auto"
) -> MadeAdapter[MergeReport]:
    """Merge into an adapter in memory, which knows its card and its recipe.

    Args:
        plan: What to do.
        strict: Treat it as an error if the cut to a rank lost most of the result.
        jobs: Worker threads.
        device: Where to compute.

    Raises:
        AdapterError: If an input turns out damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        if plan.measured:
            plan = settle(plan, Path(folder), jobs=jobs, device=device)
        writer = MemoryWriter(plan.output)
        modules = execute(plan, writer, jobs=jobs, device=device)
    report = _finish_report(plan, modules, None, strict=strict)
    text = f"# made by lora-merge {__version__}\n" + plan.resolved_recipe().to_yaml()
    texts = {RECIPE_NAME: text + _members(plan, modules), "README.md": _card(plan, text)}
    return MadeAdapter.of(writer.adapter("merged"), report, texts=texts, notes=report.notes)


def _members(plan: MergePlan, modules: Sequence[ModuleReport]) -> str:
    """What each unit was made of, for the recipe; nothing where units are cut afterwards."""
    names = [adapter.name for adapter in plan.alignment.adapters]
    return clusters_text(modules, names) if plan.units_survive else ""


def _silent_adapters(plan: MergePlan, modules: Sequence[ModuleReport]) -> list[str]:
    """A note for each adapter that adds nothing anywhere."""
    norms = zip(*(m.adapter_norms for m in modules), strict=True)
    return [
        f"{adapter.name} adds nothing: its B is zero, as before training"
        for adapter, values in zip(plan.alignment.adapters, norms, strict=True)
        if not any(values)
    ]


def _finish_report(
    plan: MergePlan, modules: Sequence[ModuleReport], out: str | None, *, strict: bool
) -> MergeReport:
    """The report of a merge, with what the cut to ranks did to it.

    Raises:
        MethodError: With `strict`, if less than half of the energy was kept.
    """
    notes = [*plan.notes, *_silent_adapters(plan, modules)]
    report = MergeReport(
        tuple(modules),
        plan.notes,
        out,
        plan.output.num_bytes,
        scale=plan.semantics.factor,
        scale_reason=plan.scale_reason,
    )
    retained = report.total().retained
    if retained < _LITTLE_ENERGY:
        share = f"the cut to {_ranks_text(plan)} kept {100 * retained:.0f} % of the result's energy"
        remedy = "a larger --rank keeps more; ctm and wudi are made for a given rank"
        if strict:
            raise MethodError(share, remedy)
        notes.append(f"{share}; {remedy}")
    if plan.measured:
        rule = "the exact result" if plan.rule.kind == "units" else str(plan.rule)
        notes.append(f"{rule} has {_ranks_text(plan)}")
    shrinks = [shrink for module in modules for shrink in module.said("shrink")]
    if shrinks and sum(shrinks) / len(shrinks) < _SHRUNK:
        notes.append(
            f"{plan.method.name} left {sum(shrinks) / len(shrinks):.2f} of the mean: it is for "
            "adapters of one task, and takes different ones for noise"
        )
    return replace(report, notes=tuple(notes))


def _ranks_text(plan: MergePlan) -> str:
    low, high = min(plan.ranks.values()), max(plan.ranks.values())
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


def _card(plan: MergePlan, recipe: str) -> str:
    """The model card of a merged adapter."""
    adapters, weights = plan.alignment.adapters, plan.weights
    return model_card(
        title="A merged LoRA adapter",
        base_model=plan.alignment.base_model,
        sources=[(adapters[i].name, str(weights[i])) for i in plan.by_name],
        method=f"`{plan.method.name}` ({plan.method.summary}; {plan.method.paper})",
        recipe=recipe,
        # A recipe that is run again has the scale as a number, and the card shall be the same.
        notes=[note for note in plan.notes if note != plan.scale_reason],
    )
