"""Run a plan: into a directory, whole or not at all, or in memory."""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_merge._version import __version__
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.in_memory import MadeAdapter, MemoryWriter
from lora_merge.adapters.measured.silence import why_silent
from lora_merge.adapters.writer import AdapterWriter, Writer
from lora_merge.errors import MethodError
from lora_merge.files.atomic import atomic_directory
from lora_merge.files.pages.cards import model_card
from lora_merge.machine.parallel import default_jobs
from lora_merge.merge.clusters.members import clusters_text
from lora_merge.merge.executor import execute, settle
from lora_merge.merge.plan import MergePlan
from lora_merge.merge.recipe.recipe import RECIPE_NAME, Recipe
from lora_merge.merge.report import MergeReport, ModuleReport
from lora_merge.planning import How, Plan
from lora_merge.printing import Summary
from lora_merge.printing import notes as noted

# Below this share of energy kept, the result is not what the method made.
_LITTLE_ENERGY = 0.5

# Below this share of the mean, Model Stock has erased what it was to merge.
_SHRUNK = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class PlannedMerge(Plan[MadeAdapter[MergeReport]]):
    """A merge, ready to run.

    Attributes:
        merge: Everything that was decided; with its `spool`, what is there already.
        strict: Treat it as an error if the cut to a rank lost most of the result.
    """

    merge: MergePlan
    strict: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know before the work starts."""
        return self.merge.notes

    @property
    def peak_bytes(self) -> int:
        """Working memory of one worker."""
        return self.merge.peak_bytes(1)

    def summary(self) -> Summary:
        """Method, adapters, modules and size."""
        plan = self.merge
        modules = f"{len(plan.alignment.modules)}, {_ranks_text(plan)}"
        facts = [
            ("adapters", f"{len(plan.alignment.adapters)}"),
            ("modules", modules if not plan.measured else f"{modules} at most"),
            ("size", f"{plan.output.num_bytes:,} bytes, {plan.output.dtype}"),
            ("scale", f"{plan.semantics.factor:g}"),
        ]
        return Summary(f"Plan of a merge by {plan.method.name}", (*facts, *noted(self.notes)))

    def rows(self) -> list[dict[str, Any]]:
        """One row per module."""
        return [
            {
                "name": m.name,
                "adapters": list(m.specs),
                "units": m.num_units,
                "rank": self.merge.ranks[m.name],
                "shape": [m.first.d_out, m.first.d_in],
            }
            for m in self.merge.alignment.modules
        ]

    def to_dict(self, jobs: int | None = None) -> dict[str, Any]:
        """As JSON values; the memory is that of so many jobs (default: the CPUs)."""
        plan = self.merge
        parts = zip(plan.alignment.adapters, plan.weights, plan.own, strict=True)
        return {
            "schema": 1,
            "method": plan.method.name,
            "rank_rule": str(plan.rule),
            "base_model": plan.alignment.base_model,
            "adapters": [
                {
                    "adapter": a.name,
                    "weight": w.to_data(),
                    "parameters": {name: value.to_data() for name, value in own.items()},
                    "ranks": sorted(a.ranks()),
                    "modules": len(a.modules),
                }
                for a, w, own in parts
            ],
            "modules": self.rows(),
            "output_bytes": plan.output.num_bytes,
            "peak_bytes": plan.peak_bytes(jobs or default_jobs()),
            "dtype": plan.output.dtype,
            "notes": list(plan.notes),
            "scale": plan.semantics.factor,
            "scale_reason": plan.scale_reason,
        }

    def _run(self, how: How) -> MadeAdapter[MergeReport]:
        """The merged adapter, which knows its card and its recipe.

        Raises:
            AdapterError: If an input turns out damaged; nothing is left behind.
            MethodError: If `strict`, and less than half of the energy was kept.
        """
        if how.out is None:
            return self._in_memory(how)
        report = self._into(how.out, how)
        return MadeAdapter.of(Adapter.from_pretrained(how.out), report)

    def _into(self, out: Path, how: How) -> MergeReport:
        plan = self.merge
        inputs = [path for adapter in plan.alignment.adapters for path in adapter.files]
        inputs += [plan.statistics.path] if plan.statistics else []
        needed = plan.output.num_bytes
        with atomic_directory(out, force=how.force, inputs=inputs, needed=needed) as folder:
            with ThreadPoolExecutor(1) as beside:
                resolved = beside.submit(plan.resolved_recipe)  # hashes the inputs meanwhile
                plan = _settled(plan, folder / ".spool", how)
                with AdapterWriter(folder, plan.output) as writer:
                    modules = _filled(plan, writer, how)
                if (folder / ".spool").exists():
                    (folder / ".spool").rmdir()
                recipe = resolved.result()
            report = _finish_report(plan, modules, str(out), strict=self.strict)
            for name, text in _texts(plan, modules, recipe).items():
                (folder / name).write_text(text, encoding="utf-8")
        return report

    def _in_memory(self, how: How) -> MadeAdapter[MergeReport]:
        with tempfile.TemporaryDirectory() as folder:
            plan = _settled(self.merge, Path(folder) / "spool", how)
            writer = MemoryWriter(plan.output)
            modules = _filled(plan, writer, how)
        report = _finish_report(plan, modules, None, strict=self.strict)
        texts = _texts(plan, modules, plan.resolved_recipe())
        return MadeAdapter.of(writer.adapter("merged"), report, texts=texts, notes=report.notes)


def _settled(plan: MergePlan, spool: Path, how: How) -> MergePlan:
    """The plan with its ranks; where they depend on the results, these wait in a spool."""
    if not plan.measured or plan.spool is not None:
        return plan
    spool.mkdir()
    return settle(plan, spool, jobs=how.jobs, device=how.device)


def _filled(plan: MergePlan, writer: Writer, how: How) -> list[ModuleReport]:
    """Every module merged and written."""
    step = how.step("merging", len(plan.alignment.modules))
    return execute(plan, writer, jobs=how.jobs, device=how.device, on_module=lambda _: step())


def _texts(plan: MergePlan, modules: Sequence[ModuleReport], recipe: Recipe) -> dict[str, str]:
    """What lies beside the weights: the recipe, with the members of units, and the card."""
    text = f"# made by lora-merge {__version__}\n" + recipe.to_yaml()
    return {RECIPE_NAME: text + _members(plan, modules), "README.md": _card(plan, text)}


def _members(plan: MergePlan, modules: Sequence[ModuleReport]) -> str:
    """What each unit was made of, for the recipe; nothing where units are cut afterwards."""
    names = [adapter.name for adapter in plan.alignment.adapters]
    return clusters_text(modules, names) if plan.units_survive else ""


def _silent_adapters(plan: MergePlan, modules: Sequence[ModuleReport]) -> list[str]:
    """A note for each adapter that adds nothing anywhere."""
    norms = zip(*(m.adapter_norms for m in modules), strict=True)
    found = []
    for index, values in enumerate(norms):
        if not any(values):
            adapter = plan.alignment.adapters[index]
            weights = [float(plan.weights_at(name)[index]) for name in adapter.modules]
            why = why_silent(adapter, adapter.modules, weights)
            found.append(f"{adapter.name} adds nothing: {why}")
    return found


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
