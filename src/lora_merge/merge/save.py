"""Run a plan into a directory: weights, config, card and recipe, whole or not at all."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_merge._version import __version__
from lora_merge.adapters import AdapterWriter, atomic_directory, check_target
from lora_merge.adapters.card import model_card
from lora_merge.merge.executor import execute
from lora_merge.merge.plan import MergePlan
from lora_merge.merge.recipe import RECIPE_NAME, Recipe
from lora_merge.merge.report import MergeReport, ModuleReport


def save_merge(
    plan: MergePlan,
    out: Path,
    *,
    recipe: Callable[[], Recipe],
    force: bool = False,
    jobs: int | None = None,
    device: str = "auto",
    on_module: Callable[[ModuleReport], None] | None = None,
) -> MergeReport:
    """Merge into a directory that appears when everything is done.

    Args:
        plan: What to do.
        out: The directory to make.
        recipe: Makes the resolved recipe; called beside the merge, because it hashes the inputs.
        force: Replace an existing adapter directory.
        jobs: Worker threads.
        device: Where to compute.
        on_module: Called with each module's report.

    Raises:
        OutputError: If the directory cannot be written; nothing is left behind.
        AdapterError: If an input turns out damaged; nothing is left behind.
    """
    sources = [a.source for a in plan.alignment.adapters if a.source]
    inputs = [path for s in sources for path in (s.weights, s.config) if path]
    check_target(out, force=force, inputs=inputs, needed=plan.output.num_bytes)
    with atomic_directory(out) as folder:
        with ThreadPoolExecutor(1) as beside:
            resolved = beside.submit(recipe)
            with AdapterWriter(folder, plan.output) as writer:
                modules = execute(plan, writer, jobs=jobs, device=device, on_module=on_module)
            text = f"# made by lora-merge {__version__}\n" + resolved.result().to_yaml()
        (folder / RECIPE_NAME).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(_card(plan, text), encoding="utf-8")
    notes = (*plan.notes, *_silent_adapters(plan, modules))
    return MergeReport(tuple(modules), notes, str(out), plan.output.num_bytes)


def _silent_adapters(plan: MergePlan, modules: list[ModuleReport]) -> list[str]:
    """A note for each adapter that adds nothing anywhere."""
    norms = zip(*(m.adapter_norms for m in modules), strict=True)
    return [
        f"{adapter.name} adds nothing: its B is zero, as before training"
        for adapter, values in zip(plan.alignment.adapters, norms, strict=True)
        if not any(values)
    ]


def _card(plan: MergePlan, recipe: str) -> str:
    names = [a.name for a in plan.alignment.adapters]
    return model_card(
        title="A merged LoRA adapter",
        base_model=plan.alignment.base_model,
        sources=list(zip(names, plan.weights, strict=True)),
        method=f"`{plan.method.name}` ({plan.method.summary}; {plan.method.paper})",
        recipe=recipe,
        notes=plan.notes,
    )
