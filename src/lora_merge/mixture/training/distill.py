"""Distil a two-pass X-LoRA gate into a linear gate in each module: one pass, no second cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.errors import MethodError
from lora_merge.mixture.gates.memory import evidence
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import AttachedMixture, load_mixture
from lora_merge.mixture.runtime.call.passes import current
from lora_merge.mixture.runtime.targets import find_targets
from lora_merge.mixture.training.data import Example, in_order


@dataclass(frozen=True, eq=False)
class Distillation:
    """A linear stand-in for an X-LoRA gate.

    Attributes:
        mixture: With a gate on each module's own input.
        error: Half the mean absolute difference of the weights, summed over experts (total
            variation: 0 the same, 1 disjoint), on the rows it was measured on.
    """

    mixture: Mixture
    error: float


def distill_xlora(
    model: nn.Module,
    mixture: Mixture,
    examples: Sequence[Example],
    *,
    held: Sequence[Example] | None = None,
    ridge: float = 1e-3,
    batch_size: int = 8,
) -> Distillation:
    """Fit W_n x to X-LoRA's scores of module n by ridge regression, in closed form.

    Softmax ignores what all scores share, so the scores are centred over experts. A gate with
    memory is fitted to what each token adds, and the student keeps the memory. One d_in x d_in
    float64 matrix is held per group of modules that read the same input.

    Args:
        model: Base model, without an active mixture.
        mixture: An X-LoRA mixture without a null expert.
        examples: Rows to learn from; their first passes are recorded.
        held: Rows to measure the error on; default: those it was learned from.
        ridge: Of the mean squared input.
        batch_size: Rows of one pass.

    Raises:
        MethodError: If the gate is no X-LoRA gate.
    """
    spec = mixture.spec
    if spec.signal != "hidden" or spec.null_expert or not spec.value.startswith("softmax"):
        raise MethodError(f"the {spec.preset} gate has no second pass to save", "distil xlora")
    teacher = load_mixture(model, mixture, name="teacher")
    try:
        gate = _fit(model, teacher, mixture, examples, ridge, batch_size)
        student_spec = replace(
            spec, preset="meteora", signal="input", granularity="module", bypass=True, trained=True
        )
        student = Mixture.of(student_spec, mixture.experts, gate)
        rows = held if held is not None else examples
        wanted = _weights(model, teacher, rows, batch_size)
    finally:
        teacher.detach()
    pupil = load_mixture(model, student, name="student")
    try:
        got = _weights(model, pupil, rows, batch_size)
    finally:
        pupil.detach()
    distances = [
        float((got[name] - wanted[name][:, _present(mixture, name)]).abs().sum(-1).mean()) / 2
        for name in got
    ]
    return Distillation(student, sum(distances) / len(distances))


def _fit(
    model: nn.Module,
    teacher: AttachedMixture,
    mixture: Mixture,
    examples: Sequence[Example],
    ridge: float,
    batch_size: int,
) -> dict[str, Tensor]:
    """Rows of every module's gate: (X^T X + ridge)^-1 X^T scores."""
    grams, products = _normal_equations(model, teacher, mixture, examples, batch_size)
    gate = {}
    for group in teacher.parts:
        gram = grams[group.names[0]]
        gram = gram + torch.eye(len(gram)).to(gram) * ridge * gram.diagonal().mean()
        for name in group.names:
            rows = torch.linalg.solve(gram, products[name]).mT
            gate[f"{name}.weight"] = rows[_present(mixture, name)].float().contiguous()
    return gate


def _normal_equations(
    model: nn.Module,
    teacher: AttachedMixture,
    mixture: Mixture,
    examples: Sequence[Example],
    batch_size: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """X^T X by each group's first module and X^T scores by module, over all tokens, float64."""
    numbers = {name: n for n, name in enumerate(mixture.modules)}
    scores: list[Tensor] = []
    grams: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    mask = torch.zeros(0, 0, dtype=torch.bool)

    def record(module_scores: Tensor, weights: Tensor, present: tuple[int, ...]) -> None:
        sums = module_scores.view(*mask.shape, -1)
        own = evidence(sums, mixture.spec.memory)  # the student has the same memory
        scores.append(own - own.mean(-1, keepdim=True))

    def look(names: Sequence[str]) -> Any:
        def hook(target: nn.Module, args: tuple[Any, ...]) -> None:
            passed = current(teacher.switch)
            if passed is None or passed.bypass or not args[0].is_floating_point():
                return
            x = args[0][mask].double()
            first = names[0]
            grams[first] = grams.get(first, 0) + x.mT @ x
            for name in names:
                wanted = scores[numbers[name] if len(scores) > 1 else 0][mask].double()
                products[name] = products.get(name, 0) + x.mT @ wanted

        return hook

    targets = find_targets(model, mixture)
    handles = [
        targets[group.names[0]].register_forward_pre_hook(look(group.names))
        for group in teacher.parts
    ]
    try:
        with torch.no_grad(), teacher.using(observe_hidden=record):
            for batch in in_order(examples, batch_size):
                on = batch.to(teacher.device)
                scores.clear()
                mask = on.mask.bool()
                model(input_ids=on.ids, attention_mask=on.mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return grams, products


def _weights(
    model: nn.Module, handle: AttachedMixture, examples: Sequence[Example], batch_size: int
) -> dict[str, Tensor]:
    """Weights of every token in every module, shape (T, experts)."""
    found: dict[str, list[Tensor]] = {}
    handle.activate()
    with torch.no_grad():
        for batch in in_order(examples, batch_size):
            on = batch.to(handle.device)
            with handle.watch() as usage:
                model(input_ids=on.ids, attention_mask=on.mask, use_cache=False)
            mask = on.mask.bool().flatten()
            for name, entry in usage.modules.items():
                if entry.last is not None:
                    found.setdefault(name, []).append(entry.last[mask])
    return {name: torch.cat(parts) for name, parts in found.items()}


def _present(mixture: Mixture, name: str) -> list[int]:
    module = next(m for m in mixture.alignment.modules if m.name == name)
    return [index for index in module.specs if index < mixture.num_experts]
