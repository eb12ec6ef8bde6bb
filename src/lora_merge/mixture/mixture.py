"""A mixture: experts, a gate, and nothing else. What is saved, and what is attached to a model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.access.adapter_like import AdaptersLike
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.alignment import Alignment
from lora_merge.errors import AdapterError, AlignmentError, MethodError
from lora_merge.mixture.expert import Expert, align_experts, make_experts
from lora_merge.mixture.formats.directory import Contents, load, push, save
from lora_merge.mixture.gates.gate import GateSpec, gate_spec
from lora_merge.mixture.gates.initial import initial_gate
from lora_merge.mixture.gates.text_index import CENTRE, DESCRIPTORS, SCALE
from lora_merge.mixture.insight.descriptors import Descriptors
from lora_merge.printing import Printed, Summary, span
from lora_merge.printing import notes as noted

DEFAULT_PRESET = "arrow"


class Mixture(Printed):
    """Experts and a gate: y = W x + sum_e g_e(x) s_e B_e A_e x, a mixture of outputs.

    Factors are never averaged: averaging A's and B's apart is another function.

    Args:
        experts: What `open_adapters` takes; ranks and target modules may differ.
        preset: A gate of `PRESETS`.
        names: One per expert; default: from the references.
        general: Adapters whose mean is subtracted from every expert (Arrow's GenKnowSub).
        seed: For gates that start with drawn rows.
        hidden_size: Width of the base model's hidden state (X-LoRA), where the modules do not tell.
        accept_base_models: Accept experts that name different base models.
        settings: Fields of `GateSpec` to change, such as `top_k` or `temperature`.

    Attributes:
        spec: The gate's settings.
        experts: Gated experts first, then the general ones.
        gate: The gate's tensors by name.
        alignment: The adapters side by side.
        descriptors: What is known of the experts' texts (`novelty.describe`), or None.

    Raises:
        AlignmentError: If the adapters do not fit together; lists every mismatch.
        MethodError: If the gate cannot be what was asked for.
    """

    alignment: Alignment
    descriptors: Descriptors | None = None

    def __init__(
        self,
        experts: AdaptersLike,
        preset: str = DEFAULT_PRESET,
        *,
        names: Sequence[str] | None = None,
        general: AdaptersLike = (),
        seed: int = 0,
        hidden_size: int | None = None,
        accept_base_models: bool = False,
        **settings: Any,
    ) -> None:
        spec = gate_spec(preset, **settings)
        loaded = make_experts(experts, names=names)
        loaded += make_experts(general, taken=[e.name for e in loaded], general=True)
        self._set(spec, loaded, accept_base_models=accept_base_models)
        self.gate: dict[str, Tensor] = initial_gate(
            self.alignment, self.spec, self.num_experts, seed=seed, hidden_size=hidden_size
        )

    @classmethod
    def of(cls, spec: GateSpec, experts: Sequence[Expert], gate: Mapping[str, Tensor]) -> "Mixture":
        """A mixture whose gate tensors exist already.

        Raises:
            MethodError: If a gate tensor is missing, unknown or has the wrong shape. A gate is
                never filled up with random numbers.
        """
        mixture = cls.__new__(cls)
        mixture._set(spec, experts, accept_base_models=True)  # decided when it was made
        mixture.gate = dict(gate)
        check_gate(mixture)
        return mixture

    def _set(
        self, spec: GateSpec, experts: Sequence[Expert], *, accept_base_models: bool = False
    ) -> None:
        if not experts or experts[0].general:
            raise MethodError("a mixture needs at least one expert", "name an adapter")
        self.alignment = align_experts(experts, accept_base_models=accept_base_models)
        pairs = zip(experts, self.alignment.adapters, strict=True)
        self.experts = tuple(replace(expert, adapter=adapter) for expert, adapter in pairs)
        self.spec = _fit_weights(spec, self.num_experts)
        _refuse_unmixable(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mixture":
        """Itself: a copy of a model shares what its mixture was made of, which nothing changes."""
        return self

    def summary(self) -> Summary:
        """Gate, experts, and what to know."""
        spec = self.spec
        kept = f", top {spec.top_k}" if spec.top_k else ""
        trained = "" if spec.trained else ", untrained"
        facts = [
            ("base model", self.alignment.base_model or "not said"),
            ("gate", f"{spec.signal}, per {spec.granularity}, {spec.value}{kept}{trained}"),
            ("modules", f"{len(self.gated_modules)}"),
        ]
        for expert in self.experts:
            what = "subtracted" if expert.general else "expert"
            facts.append((what, f"{expert.name}, rank {span(list(expert.adapter.ranks()))}"))
        title = f"Mixture of {self.num_experts} experts behind {spec.preset}"
        return Summary(title, (*facts, *noted(self.notes)))

    @property
    def num_experts(self) -> int:
        """Gated experts; general ones are not counted."""
        return sum(not expert.general for expert in self.experts)

    @property
    def names(self) -> list[str]:
        """Names of the gated experts, in the order of the gate's columns."""
        return [expert.name for expert in self.experts if not expert.general]

    @property
    def modules(self) -> list[str]:
        """Wrapped modules in name order, which is the order of X-LoRA's layers."""
        return [module.name for module in self.alignment.modules]

    @property
    def gated_modules(self) -> list[AlignedModule]:
        """Modules that a gated expert adapts, in name order; not those of general ones alone."""
        return [m for m in self.alignment.modules if min(m.specs) < self.num_experts]

    @property
    def files(self) -> list[Path]:
        """Where the experts' tensors are read from; none for experts in memory."""
        return [e.adapter.source.weights for e in self.experts if e.adapter.source]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the experts hold that no gate can weigh, in words."""
        found = []
        for expert in self.experts:
            extras = expert.adapter.extras
            if extras:
                kinds = sorted({name.rpartition(".")[2] for name in extras})
                found.append(
                    f"{expert.name} also holds {len(extras)} tensors saved whole "
                    f"({', '.join(kinds)}; such as {min(extras)}): a mixture leaves them out"
                )
        return tuple(found)

    def with_gate(self, gate: Mapping[str, Tensor], **settings: Any) -> "Mixture":
        """The same experts under another gate, say a trained one."""
        mixture = Mixture.of(replace(self.spec, **settings), self.experts, gate)
        mixture.descriptors = self.descriptors
        return mixture

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the mixture directory; whole or not at all. See `directory.save`."""
        return save(self._contents(), Path(folder), force=force)

    @classmethod
    def from_pretrained(cls, ref: str | Path, *, verify: bool = True) -> "Mixture":
        """Open a mixture directory or Hub repository. See `directory.load`."""
        found = load(ref, verify=verify)
        mixture = cls.of(found.spec, found.experts, found.gate)
        mixture.descriptors = found.descriptors
        if found.modules not in (None, mixture.modules):
            raise AdapterError(
                f"{ref}: the modules in its config are not those of the experts",
                "get the whole directory again",
            )
        return mixture

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Upload the mixture directory; returns the commit's URL. See `directory.push`."""
        return push(self._contents(), repo, private=private)

    def _contents(self) -> Contents:
        base = self.alignment.base_model
        return Contents(self.spec, self.experts, self.gate, self.modules, base, self.descriptors)


def check_gate(mixture: Mixture) -> None:
    """Refuse gate tensors that are not exactly what the gate needs; names every fault."""
    wanted = expected_shapes(mixture)
    faults = [f"{name} is missing" for name in wanted if name not in mixture.gate]
    faults += [f"{name} is not part of it" for name in mixture.gate if name not in wanted]
    for name, shape in wanted.items():
        tensor = mixture.gate.get(name)
        if tensor is None:
            continue
        fits = all(w is None or w == n for w, n in zip(shape, tensor.shape, strict=False))
        if len(shape) != tensor.dim() or not fits:
            faults.append(f"{name} is {list(tensor.shape)}, not {[n or '?' for n in shape]}")
        elif not bool(torch.isfinite(tensor).all()):
            faults.append(f"{name} holds NaN or infinity")
    if faults:
        raise MethodError(
            f"the {mixture.spec.preset} gate does not fit its experts:\n  "
            + "\n  ".join(faults[:8])
            + (f"\n  and {len(faults) - 8} more" if len(faults) > 8 else ""),
            "get the whole directory again; a gate is never filled up with random numbers",
        )


def expected_shapes(mixture: Mixture) -> dict[str, tuple[int | None, ...]]:
    """Name -> shape of the gate's tensors; None where the base model decides."""
    spec, count = mixture.spec, mixture.num_experts
    shapes: dict[str, tuple[int | None, ...]] = {}
    if spec.signal == "hidden":
        outputs = count + int(spec.null_expert)
        outputs *= len(mixture.modules) if spec.granularity == "module" else 1
        sizes: list[int | None] = [None, *[spec.width] * (spec.depth - 1), outputs]
        for index, (before, after) in enumerate(pairwise(sizes)):
            shapes[f"classifier.{index}.weight"] = (after, before)
            shapes[f"classifier.{index}.bias"] = (after,)
        return shapes
    if spec.signal == "text":
        return {CENTRE: (None,), SCALE: (None,), DESCRIPTORS: (count, None)}
    if not spec.has_rows:
        return shapes
    for module in mixture.gated_modules:
        present = [i for i in module.specs if i < count]
        width = module.first.d_in
        if spec.signal == "prototype":
            shapes[f"{module.name}.prototype"] = (len(present), width)
        elif spec.granularity == "rank":
            ranks = sum(module.specs[i].rank for i in present)
            shapes[f"{module.name}.weight"] = (ranks, width)
            shapes[f"{module.name}.rank_bias"] = (ranks,)
        else:
            shapes[f"{module.name}.weight"] = (len(present) + int(spec.null_expert), width)
    return shapes


def _fit_weights(spec: GateSpec, count: int) -> GateSpec:
    """Give a constant gate one weight per expert; the mean where none were named."""
    if spec.signal != "constant" or len(spec.weights) == count:
        return spec
    if spec.weights:
        raise MethodError(
            f"{len(spec.weights)} weights for {count} experts", "give one weight per expert"
        )
    return replace(spec, weights=(1.0 / count,) * count)


def _refuse_unmixable(mixture: Mixture) -> None:
    """Refuse what a gate cannot weigh, before anything is computed."""
    if mixture.num_experts < len(mixture.experts) and mixture.spec.signal != "prototype":
        raise MethodError(
            f"general adapters are subtracted by arrow, not by {mixture.spec.preset}",
            "use --preset arrow, or leave --general out",
        )
    faults = []
    for expert in mixture.experts:
        for spec in expert.adapter.modules.values():
            if spec.key_bias:
                faults.append(f"{expert.name}: {spec.name} has a bias on B (lora_bias)")
    if faults:
        raise AlignmentError(
            faults[:8],
            "a gate weighs plain low-rank modules only",
            what="there are modules that no gate can weigh",
        )
