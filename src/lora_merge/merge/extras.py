"""What becomes of tensors that are not low-rank factors: biases, modules saved whole."""

from collections.abc import Sequence

from lora_merge.adapters.adapter import Adapter
from lora_merge.errors import AlignmentError
from lora_merge.files.tensor_file import DTYPES
from lora_merge.merge.recipe.recipe import ExtrasPolicy


def plan_extras(
    adapters: Sequence[Adapter], policy: ExtrasPolicy
) -> tuple[dict[str, tuple[Adapter, ...]], list[str]]:
    """Which tensors that are not factors are kept, from which adapters, and what to say of it."""
    owners: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        for name in adapter.extras:
            owners.setdefault(name, []).append(adapter)
    if not owners:
        return {}, []
    what = f"{len(owners)} tensors that are not low-rank factors ({_some(list(owners))})"
    if policy == "error":
        raise AlignmentError([f"there are {what}"], "choose --extras average, first or drop")
    if policy == "drop":
        return {}, [f"dropped {what}"]
    if policy == "first":
        chosen = {name: holders[:1] for name, holders in owners.items()}
    else:
        chosen = dict(owners)
    mismatches = [m for name, holders in chosen.items() if (m := _extra_mismatch(name, holders))]
    if mismatches:
        raise AlignmentError(
            mismatches, "these tensors cannot be averaged; choose --extras first or --extras drop"
        )
    verb = "averaged" if policy == "average" else "kept the first adapter's"
    return {name: tuple(chosen[name]) for name in sorted(chosen)}, [f"{verb} {what}"]


def _extra_mismatch(name: str, holders: Sequence[Adapter]) -> str | None:
    """Why the holders' tensors of this name have no average, or None."""
    kinds: dict[str, str] = {}
    for holder in holders:
        spec = holder.extras[name]
        if spec.dtype not in DTYPES:
            return f"{name}: dtype {spec.dtype} ({holder.name})"
        kinds.setdefault(str(list(spec.shape)), holder.name)
    if len(kinds) == 1:
        return None
    return f"{name}: " + ", ".join(f"{shape} ({who})" for shape, who in kinds.items())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
