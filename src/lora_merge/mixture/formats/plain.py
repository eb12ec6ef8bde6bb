"""Mixtures for tools that know no gates: one folder per expert, or one static adapter."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_merge.adapters.alignment import read_stacks
from lora_merge.adapters.identity.expert_layout import is_apart
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.adapters.writer import AdapterWriter, plan_output
from lora_merge.errors import MethodError
from lora_merge.files.atomic import atomic_directory
from lora_merge.mixture.expert import Expert, slug, write_adapter, write_expert
from lora_merge.mixture.formats.experts_in_memory import plain_adapter
from lora_merge.mixture.mixture import Mixture


def export_experts(mixture: Mixture, folder: Path, *, force: bool = False) -> list[Path]:
    """Every expert as a plain LoRA folder: a server's request-level routing picks one.

    Returns:
        The folders.

    Raises:
        MethodError: If two experts' names would make the same folder.
    """
    places: dict[str, Expert] = {}
    for expert in mixture.experts[: mixture.num_experts]:
        other = places.setdefault(slug(expert.name), expert)
        if other is not expert:
            raise MethodError(
                f"the experts {other.name!r} and {expert.name!r} would share a folder",
                "make the mixture again with names that differ in letters or digits",
            )
    with atomic_directory(folder, force=force, inputs=mixture.files) as staging:
        for place, expert in places.items():
            (staging / place).mkdir()
            write_expert(expert, staging / place)
        names = {"lora_merge": "experts of a mixture", "experts": list(places)}
        (staging / "config.json").write_text(json.dumps(names, indent=2) + "\n")
    return [folder / place for place in places]


def export_static(
    mixture: Mixture,
    folder: Path,
    *,
    weights: Sequence[float] | Mapping[str, Tensor] | None = None,
    rank: int | None = None,
    force: bool = False,
) -> float:
    """One plain LoRA: the mixture with its gate held still, for engines without gates.

    Args:
        mixture: The mixture.
        folder: To make.
        weights: One per expert, or by module (a `Usage`'s mean weights); default: 1 / N.
        rank: Largest rank (vLLM's default limit is 16); None keeps all R, which is exact.
        force: Replace an adapter directory that is there.

    Returns:
        Relative Frobenius error of the cut, over all modules; 0 where all ranks are kept.
    """
    table = _weight_table(mixture, weights)
    modules = mixture.gated_modules
    ranks = {m.name: min(m.num_units, rank or m.num_units) for m in modules}
    adapters = [e.adapter for e in mixture.experts]
    plan = plan_output(adapters, modules, ranks, dtype="F32", layout="uniform")
    lost = total = 0.0

    def weighed() -> Iterator[tuple[str, RankStack]]:
        nonlocal lost, total
        for module in modules:
            (stack,) = read_stacks(mixture.alignment, module)
            whole = stack.weighted(with_general(table[module.name], mixture))
            part, missing = cut(whole, ranks[module.name])
            lost, total = lost + missing, total + whole.inner(whole)
            yield module.name, part

    place = atomic_directory(folder, force=force, inputs=mixture.files, needed=plan.num_bytes)
    with place as staging:
        if is_apart(ranks):  # what is one stack in a file comes expert by expert
            parts = dict(weighed())
            write_adapter(plain_adapter(mixture, adapters, parts, folder.name), staging)
        else:
            with AdapterWriter(staging, plan) as writer:
                for name, part in weighed():
                    writer.add(name, [part])
    return float((lost / total) ** 0.5) if total > 0 else 0.0


def _weight_table(
    mixture: Mixture, weights: Sequence[float] | Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Weights (E,) of every gated module."""
    count, modules = mixture.num_experts, [m.name for m in mixture.gated_modules]
    if isinstance(weights, Mapping):
        missing = [name for name in modules if name not in weights]
        if missing:
            raise MethodError(f"no weights for {missing[0]}", "measure the usage of all modules")
        return {name: weights[name].double() for name in modules}
    own = mixture.spec.weights if mixture.spec.signal == "constant" else (1.0 / count,) * count
    row = torch.tensor(list(weights or own), dtype=torch.float64)
    if len(row) != count:
        raise MethodError(f"{len(row)} weights for {count} experts", "give one per expert")
    if not bool(row.isfinite().all()):
        raise MethodError(f"the weights are {row.tolist()}", "give finite numbers")
    return dict.fromkeys(modules, row)


def with_general(weights: Tensor, mixture: Mixture) -> Tensor:
    """Append what general experts get: minus the sum, shared among them."""
    general = len(mixture.experts) - mixture.num_experts
    share = -weights.sum() / max(general, 1)
    return torch.cat([weights, share.expand(general)])


def cut(stack: RankStack, rank: int) -> tuple[RankStack, float]:
    """The best approximation of a rank, and the squared Frobenius norm of what it leaves out."""
    if stack.num_units <= rank:
        return stack, 0.0
    u, s, vh = stack.svd()
    root = s[:rank].sqrt().to(u.dtype)
    kept = RankStack.single(u[:, :rank] * root, root[:, None] * vh[:rank])
    return kept, float(s[rank:].square().sum())
