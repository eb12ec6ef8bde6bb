"""What an adapter is: its config in words, its modules, their norms, and what is odd about it."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.adapters.dialects.table import DIALECTS
from lora_merge.adapters.measured.silence import why_silent
from lora_merge.files.tensor_file import DTYPES
from lora_merge.printing import Report, Summary, notes, span

# A layer's or an expert's number in a path.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class ModuleInfo:
    """One module of an adapter.

    Attributes:
        name: Module path.
        form: linear, conv, embedding or experts.
        shape: (d_out, d_in) of the factor product.
        num_experts: How many such products there are.
        rank: r.
        scaling: What multiplies B @ A.
        dtype: safetensors dtype code.
        verdict: Whether A and B are the format's own change of the weight: "exact", "exact with the
            base" or "approximate".
        norm: Frobenius norm of the delta, scaling included.
    """

    name: str
    form: str
    shape: tuple[int, int]
    num_experts: int
    rank: int
    scaling: float
    dtype: str
    verdict: str
    norm: float


@dataclass(frozen=True, repr=False)
class AdapterInfo(Report):
    """What an adapter is.

    Attributes:
        name: Its reference.
        dialect: The format it is written in.
        base_model: Name of the base model.
        revision: Commit on the Hub it was read from.
        task_type: PEFT's task type.
        alpha: `lora_alpha`; modules that a pattern names have their own.
        rslora: Scaling is alpha / sqrt(r).
        modules: One entry per module, in name order.
        num_parameters: Entries of all factors.
        num_bytes: Bytes of all factors as stored.
        extras: Names of the tensors that are not factors.
        norm: Frobenius norm of all deltas together.
        oddities: What a user should know before merging, in words.
    """

    name: str
    dialect: str
    base_model: str | None
    revision: str | None
    task_type: str | None
    alpha: float
    rslora: bool
    modules: tuple[ModuleInfo, ...]
    num_parameters: int
    num_bytes: int
    extras: tuple[str, ...]
    norm: float
    oddities: tuple[str, ...]

    def summary(self) -> Summary:
        """Base model, size, norm, and what is odd about it."""
        facts = [
            ("base model", self.base_model or "not said"),
            ("format", self.dialect),
            ("modules", f"{len(self.modules)}, rank {span([m.rank for m in self.modules] or [0])}"),
            ("parameters", f"{self.num_parameters:,}"),
            ("norm", f"{self.norm:.4g} (Frobenius, all deltas together)"),
        ]
        return Summary(f"Adapter {self.name}", (*facts, *notes(self.oddities)))

    def rows(self) -> list[dict[str, Any]]:
        """One row per module."""
        return [asdict(module) for module in self.modules]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"schema": 1, **asdict(self)}


def describe(adapter: Adapter, *, on_module: Callable[[], None] | None = None) -> AdapterInfo:
    """Read an adapter through and say what it is.

    Args:
        adapter: The adapter.
        on_module: Called after each module.

    Raises:
        AdapterError: If a tensor is not finite; names the module.
    """
    alignment = align([adapter])
    modules = []
    for aligned in alignment.modules:
        spec = aligned.first
        square = sum(stack.inner(stack) for stack in read_stacks(alignment, aligned))
        modules.append(
            ModuleInfo(
                name=spec.name,
                form=spec.form,
                shape=(spec.d_out, spec.d_in),
                num_experts=spec.num_experts,
                rank=spec.rank,
                scaling=spec.scaling,
                dtype=spec.dtype,
                verdict=spec.recipe.verdict.replace("-", " "),
                norm=sqrt(max(square, 0.0)),
            )
        )
        if on_module:
            on_module()
    return AdapterInfo(
        name=adapter.name,
        dialect=next(d.title for d in DIALECTS if d.name == adapter.dialect),
        base_model=adapter.config.base_model,
        revision=adapter.source.revision if adapter.source else None,
        task_type=adapter.config.task_type,
        alpha=adapter.config.lora_alpha,
        rslora=adapter.config.use_rslora,
        modules=tuple(modules),
        num_parameters=adapter.num_parameters,
        num_bytes=sum(
            s.num_parameters * DTYPES[s.dtype].itemsize for s in adapter.modules.values()
        ),
        extras=tuple(adapter.extras),
        norm=sqrt(sum(m.norm**2 for m in modules)),
        oddities=tuple(_oddities(adapter, modules)),
    )


def _oddities(adapter: Adapter, modules: list[ModuleInfo]) -> list[str]:
    config = adapter.config
    found = list(adapter.notes)
    zero = [m.name for m in modules if m.norm == 0]
    if zero:
        which = "every module" if len(zero) == len(modules) else f"{len(zero)} modules"
        why = why_silent(adapter, zero)
        found.append(f"{which} adds nothing: {why} ({zero[0]})")
    for what, values in (
        ("ranks", Counter(m.rank for m in modules)),
        ("scalings", Counter(f"{m.scaling:g}" for m in modules)),
        ("dtypes", Counter(m.dtype for m in modules)),
    ):
        if len(values) > 1:
            parts = ", ".join(f"{value} ({count})" for value, count in sorted(values.items()))
            found.append(f"{what} differ between modules: {parts}")
    if config.use_rslora:
        found.append("rsLoRA: scaling is alpha / sqrt(r)")
    if config.fan_in_fan_out:
        found.append("the base stores (in, out) weights (Conv1D)")
    if any(s.key_bias for s in adapter.modules.values()):
        found.append("B has bias vectors (lora_bias)")
    if adapter.extras:
        kinds = Counter(_NUMBER.sub("*", name) for name in adapter.extras)
        named = [f"{kind} ({n})" if n > 1 else kind for kind, n in kinds.items()]
        found.append(f"{len(adapter.extras)} tensors are not low-rank factors: {', '.join(named)}")
    if config.base_model is None:
        found.append("does not say which base model it belongs to")
    return found
