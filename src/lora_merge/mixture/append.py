"""Add experts to a mixture, or take some out, and leave the gate of the others as it is."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_merge.adapters.access.adapter_like import AdaptersLike
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.errors import MethodError
from lora_merge.mixture.expert import align_experts, make_experts
from lora_merge.mixture.gates.initial import initial_gate
from lora_merge.mixture.gates.text_index import DESCRIPTORS
from lora_merge.mixture.mixture import Mixture


def append_experts(
    mixture: Mixture,
    adapters: AdaptersLike,
    *,
    names: Sequence[str] | None = None,
    seed: int = 0,
    accept_base_models: bool = False,
    descriptors: Tensor | None = None,
) -> Mixture:
    """A mixture with more experts; rows of the old ones keep every bit.

    Prototypes of the new experts are computed. A learned gate gets rows for them that still need
    training (SEMA's growing router, arXiv 2403.18886): zero rows, so that before training a new
    expert scores like one the gate has no opinion of.

    Args:
        mixture: What there is.
        adapters: New experts.
        names: Their names.
        seed: Of the rows of modules that no expert touched before.
        accept_base_models: Accept experts that name different base models.
        descriptors: For a gate by text, mean vectors of the new experts' texts, shape (n, d).

    Raises:
        AlignmentError: If they do not fit the old ones.
        MethodError: If weights of a constant gate would have to be guessed.
    """
    if mixture.spec.signal == "constant":
        raise MethodError(
            "a constant gate has one weight per expert, and none for the new ones",
            "make the mixture again with all experts and weights",
        )
    old = [expert for expert in mixture.experts if not expert.general]
    general = [expert for expert in mixture.experts if expert.general]
    new = make_experts(adapters, names=names, taken=[e.name for e in mixture.experts])
    known = descriptors is not None or not mixture.spec.is_learned
    spec = replace(mixture.spec, trained=mixture.spec.trained and known)
    experts = [*old, *new, *general]
    width = None
    if spec.signal == "hidden":
        width = mixture.gate["classifier.0.weight"].shape[1]
    alignment = align_experts(experts, accept_base_models=accept_base_models)
    count = len(old) + len(new)
    same_names = set(mixture.modules) <= {module.name for module in alignment.modules}
    only = range(len(old), count) if same_names else None
    fresh = initial_gate(alignment, spec, count, seed=seed, hidden_size=width, only=only)
    if spec.signal == "text":
        rows = mixture.gate[DESCRIPTORS]
        more = rows.new_zeros(len(new), rows.shape[1]) if descriptors is None else descriptors
        fresh = {**mixture.gate, DESCRIPTORS: torch.cat([rows, more.to(rows)])}
    elif spec.signal == "prototype" and same_names:
        for name, rows in mixture.gate.items():
            fresh[name] = torch.cat([rows, fresh[name]]) if name in fresh else rows
    grown = Mixture.of(spec, experts, fresh)
    grown.descriptors = mixture.descriptors
    if spec.signal == "hidden":
        _grow_classifier(mixture, grown)
    elif spec.signal == "input":
        before = {module.name: module for module in mixture.alignment.modules}
        for module in grown.alignment.modules:
            if module.name in before:
                _grow_rows(mixture, grown, before[module.name], module)
    return grown


def without_expert(mixture: Mixture, name: str) -> Mixture:
    """A mixture with one expert less; the others' part of the gate keeps every bit.

    Args:
        mixture: What there is.
        name: Of a gated expert.

    Raises:
        MethodError: If there is no such expert or no other, or if the gate was made for all of them
            together and would be another one without it.
    """
    if name not in mixture.names:
        raise MethodError(f"no expert is called {name!r}", f"one of {', '.join(mixture.names)}")
    if not mixture.spec.is_open:
        raise MethodError(
            f"the {mixture.spec.preset} gate weighs all its experts together, and would be another "
            f"without {name}",
            "make the mixture again without it, and train that if it is a gate to train",
        )
    if mixture.num_experts == 1:
        raise MethodError(f"{name} is the only expert", "detach the mixture")
    gone = mixture.names.index(name)
    gate = dict(mixture.gate) if mixture.spec.signal == "text" else {}
    if gate:
        rows = gate[DESCRIPTORS]
        gate[DESCRIPTORS] = torch.cat([rows[:gone], rows[gone + 1 :]])
    for module in mixture.gated_modules:
        key = f"{module.name}.prototype"
        present = [i for i in module.specs if i < mixture.num_experts]
        kept = [row for row, i in enumerate(present) if i != gone]
        if key in mixture.gate and kept:
            rows = mixture.gate[key]
            gate[key] = rows if len(kept) == len(present) else rows[kept]
    others = [expert for index, expert in enumerate(mixture.experts) if index != gone]
    smaller = Mixture.of(mixture.spec, others, gate)
    known = mixture.descriptors
    smaller.descriptors = None if known is None else known.without_expert(name)
    return smaller


def _grow_rows(mixture: Mixture, grown: Mixture, was: AlignedModule, now: AlignedModule) -> None:
    """Old rows first, zero rows for new experts after them, the null expert's row last."""
    count = mixture.num_experts
    old = mixture.gate[f"{now.name}.weight"]
    fresh = grown.gate[f"{now.name}.weight"]
    if mixture.spec.granularity == "rank":
        kept = sum(was.specs[i].rank for i in was.specs if i < count)
        bias = torch.zeros(len(fresh))
        bias[:kept] = mixture.gate[f"{now.name}.rank_bias"]
        grown.gate[f"{now.name}.rank_bias"] = bias
    else:
        kept = sum(i < count for i in was.specs)
    rows = torch.zeros_like(fresh)
    rows[:kept] = old[:kept]
    if mixture.spec.null_expert:
        rows[-1] = old[-1]
    grown.gate[f"{now.name}.weight"] = rows


def _grow_classifier(mixture: Mixture, grown: Mixture) -> None:
    """Outputs are laid out module by module; a new module's start as a zero row as well."""
    last = mixture.spec.depth - 1
    for name, tensor in mixture.gate.items():
        if not name.startswith(f"classifier.{last}."):
            grown.gate[name] = tensor
    per_module = mixture.spec.granularity == "module"
    places = (
        [grown.modules.index(name) for name in mixture.modules if name in grown.modules]
        if per_module
        else [0]
    )
    null = int(mixture.spec.null_expert)
    for part in ("weight", "bias"):
        name = f"classifier.{last}.{part}"
        old, fresh = mixture.gate[name], grown.gate[name]
        tail: tuple[int, ...] = tuple(old.shape[1:])
        old = old.view(-1, mixture.num_experts + null, *tail)
        rows: Tensor = torch.zeros_like(fresh).view(-1, grown.num_experts + null, *tail)
        rows[places, : mixture.num_experts] = old[:, : mixture.num_experts]
        if null:
            rows[places, -1] = old[:, -1]
        grown.gate[name] = rows.reshape(fresh.shape)
