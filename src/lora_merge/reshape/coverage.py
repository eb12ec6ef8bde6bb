"""What can be extracted of two checkpoints' difference, and what becomes of every other tensor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_merge.adapters.patterns import matches_any, refuse_unmatched
from lora_merge.files.checkpoint import Checkpoint, TensorPlace
from lora_merge.files.tensor_file import DTYPES
from lora_merge.linalg.factors import frobenius


@dataclass(frozen=True)
class Coverage:
    """What became of one tensor of the tuned checkpoint.

    Attributes:
        name: Tensor name.
        what: "extracted", "unchanged", "left out" (excluded or no matrix), "resized", "new",
            "removed" or "not finite".
        change: Frobenius norm of the difference over that of the base tensor, None where the two
            cannot be subtracted.
    """

    name: str
    what: str
    change: float | None


def survey(
    base: Checkpoint, tuned: Checkpoint, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[str], list[Coverage]]:
    """Which tensors can be extracted, from headers alone, and what becomes of the others.

    Args:
        base: The base model.
        tuned: The fine-tuned model.
        include: Patterns (`adapters.patterns`) of modules to extract; default: every matrix
            but embeddings and heads.
        exclude: Patterns of modules to leave out.

    Returns:
        Names to extract, and the coverage of the rest (changes not yet measured).

    Raises:
        MethodError: If a pattern matches no module.
    """
    named = [name.removesuffix(".weight") for name in tuned.tensors if name.endswith(".weight")]
    refuse_unmatched([*include, *exclude], named, "the tuned model")
    chosen, others = [], []
    for name in sorted(set(base.tensors) | set(tuned.tensors)):
        if name not in tuned.tensors or name not in base.tensors:
            others.append(Coverage(name, "new" if name in tuned.tensors else "removed", None))
        elif base.tensors[name].shape != tuned.tensors[name].shape:
            others.append(Coverage(name, "resized", None))
        elif _wanted(name, tuned.tensors[name], include, exclude):
            chosen.append(name)
        else:
            others.append(Coverage(name, "left out", None))
    return chosen, others


def measured(base: Checkpoint, tuned: Checkpoint, one: Coverage) -> Coverage:
    """The change of a tensor that is not extracted."""
    stored = {c.tensors[one.name].dtype for c in (base, tuned) if one.name in c.tensors}
    if one.what != "left out" or not stored <= DTYPES.keys():
        return one
    before, after = base.read(one.name).float(), tuned.read(one.name).float()
    change, norm = frobenius(after - before), frobenius(before)
    if not math.isfinite(change):
        return Coverage(one.name, "not finite", None)
    what = "unchanged" if change == 0 else "left out"
    return Coverage(one.name, what, change / norm if norm > 0 else None)


def _wanted(name: str, place: TensorPlace, include: Sequence[str], exclude: Sequence[str]) -> bool:
    module = name.removesuffix(".weight")
    is_matrix = name.endswith(".weight") and len(place.shape) == 2 and min(place.shape) > 1
    if not is_matrix or place.dtype not in DTYPES or matches_any(module, exclude):
        return False
    if include:
        return matches_any(module, include)
    return not any(word in module for word in ("embed", "lm_head", "wte", "wpe", "norm"))
