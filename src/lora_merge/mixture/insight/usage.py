"""Which expert speaks where: statistics of a gate's decisions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log
from typing import Any

import torch
from torch import Tensor

from lora_merge.mixture.runtime.call.in_force import Decision
from lora_merge.printing import Report, Summary


@dataclass(eq=False)
class ModuleUsage:
    """Sums over the tokens one module has seen. Padding is not counted.

    Attributes:
        tokens: How many.
        weight: Sum of each expert's weight (a rank gate's mean over the expert's units), (E,).
        kept: How often each expert's weight was not zero, (E,).
        gram: Sum over tokens of the products of two experts' weights, (E, E).
        entropy: Sum over tokens of the entropy of the weights' shares, in nats.
        last: Weights of the last pass, shape (T', E) or (T', R).
    """

    tokens: int = 0
    weight: Tensor = field(default_factory=lambda: torch.zeros(0))
    kept: Tensor = field(default_factory=lambda: torch.zeros(0))
    gram: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    entropy: float = 0.0
    last: Tensor | None = None


@dataclass(eq=False, repr=False)
class Usage(Report):
    """Statistics of every module of a mixture.

    Attributes:
        experts: Names, in the order of all columns here.
        modules: By module name.
        labels: Expert that rows name → the statistics of those rows alone, where they were counted.
    """

    experts: tuple[str, ...]
    modules: dict[str, ModuleUsage] = field(default_factory=dict)
    labels: dict[str, "Usage"] = field(default_factory=dict)

    def summary(self) -> Summary:
        """Each expert's mean weight over all modules."""
        means = self.by(lambda _: "all").get("all", torch.zeros(len(self.experts)))
        facts = [(n, f"{m:.3f}") for n, m in zip(self.experts, means.tolist(), strict=True)]
        tokens = max((entry.tokens for entry in self.modules.values()), default=0)
        title = f"Mean weights of {len(self.experts)} experts"
        return Summary(
            f"{title} on {tokens} tokens, {len(self.modules)} modules", tuple(facts[:16])
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row per module and expert."""
        return [
            {
                "module": module,
                "expert": expert,
                "weight": float(entry.weight[index]) / max(entry.tokens, 1),
                "kept": float(entry.kept[index]) / max(entry.tokens, 1),
            }
            for module, entry in self.modules.items()
            for index, expert in enumerate(self.experts)
        ]

    @torch.no_grad()
    def observe(self, decision: Decision) -> None:
        """One decision of a group."""
        if decision.replay:
            return
        for place, member in enumerate(range(decision.start, decision.stop)):
            self._count(decision, member, decision.weights[:, place].detach().float())

    def _count(self, decision: Decision, member: int, rows: Tensor) -> None:
        group, counts = decision.group, decision.counts
        entry = self.modules.setdefault(group.names[member], ModuleUsage())
        entry.last = rows
        if counts is not None and len(counts) == len(rows):
            rows = rows[counts]
        present = list(group.experts[member])
        if decision.by_rank:
            owner = group.columns_of(member)
            units = torch.bincount(owner, minlength=len(present)).clamp_min(1)
            total = rows.new_zeros(len(rows), len(present)).index_add(1, owner, rows)
            rows = total / units
        if not entry.tokens:
            entry.weight = torch.zeros(len(self.experts), dtype=torch.float64)
            entry.kept = torch.zeros(len(self.experts), dtype=torch.float64)
            entry.gram = torch.zeros(len(self.experts), len(self.experts), dtype=torch.float64)
        entry.tokens += len(rows)
        entry.weight[present] += rows.sum(0, dtype=torch.float64).cpu()
        entry.kept[present] += (rows != 0).sum(0).double().cpu()
        products = (rows.double().mT @ rows.double()).cpu()
        entry.gram[torch.tensor(present)[:, None], torch.tensor(present)] += products
        share = rows.abs() / rows.abs().sum(-1, keepdim=True).clamp_min(1e-12)
        entry.entropy += float(-(share * share.clamp_min(1e-12).log()).sum())

    def mean_weights(self) -> dict[str, Tensor]:
        """Mean weight of each expert, by module, shape (E,)."""
        return {n: m.weight / max(m.tokens, 1) for n, m in self.modules.items()}

    def by(self, key: Callable[[str], str]) -> dict[str, Tensor]:
        """Mean weights of modules put together by a key, in first-seen order."""
        found: dict[str, list[Tensor]] = {}
        for name, weights in self.mean_weights().items():
            found.setdefault(key(name), []).append(weights)
        return {group: torch.stack(rows).mean(0) for group, rows in found.items()}

    def entropies(self, key: Callable[[str], str]) -> dict[str, float]:
        """Mean entropies of modules put together by a key, as `by` does."""
        found: dict[str, list[float]] = {}
        for name in self.modules:
            found.setdefault(key(name), []).append(self.entropy(name))
        return {group: sum(values) / len(values) for group, values in found.items()}

    def similarity(self) -> Tensor:
        """Cosine of two experts' weights over tokens, mean over modules that have both, (E, E)."""
        size = len(self.experts)
        total, seen = torch.zeros(2, size, size, dtype=torch.float64)
        for entry in self.modules.values():
            norm = entry.gram.diagonal().sqrt()
            both = (norm[:, None] > 0) & (norm[None, :] > 0)
            cosine = entry.gram / (norm[:, None] * norm[None, :]).clamp_min(1e-300)
            total += torch.where(both, cosine, 0.0)
            seen += both
        mean: Tensor = total / seen.clamp_min(1)
        return mean

    def entropy(self, name: str) -> float:
        """Mean entropy of a module's gate over the largest possible: 0 one-hot, 1 uniform."""
        entry = self.modules[name]
        most = log(len(self.experts)) if len(self.experts) > 1 else 1.0
        return entry.entropy / max(entry.tokens, 1) / most

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "experts": list(self.experts),
            "modules": {
                name: {
                    "tokens": entry.tokens,
                    "weight": (entry.weight / max(entry.tokens, 1)).tolist(),
                    "kept": (entry.kept / max(entry.tokens, 1)).tolist(),
                    "entropy": self.entropy(name),
                }
                for name, entry in self.modules.items()
            },
        }
