"""What a gate can be trained with besides the language model's loss."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from lora_merge.mixture.runtime.call.in_force import Decision
from lora_merge.mixture.runtime.call.modules import Modules
from lora_merge.mixture.training.processes import Processes


@dataclass(eq=False)
class GateLosses:
    """Watches every gate of a pass and adds up its losses.

    Install `observe` as a context's observer, call `begin` before a pass and read `task`, `balance`
    and `z` after it. Padding tokens take no part.

    Attributes:
        mask: Tokens that count, bool, shape (T,).
        owners: Expert of each token or -1, int64, shape (T,).
        loads: How often each score of a rank gate was kept, by (group, member).
    """

    mask: Tensor | None = None
    owners: Tensor | None = None
    loads: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _groups: dict[int, Modules] = field(default_factory=dict)
    _terms: dict[str, list[Tensor]] = field(default_factory=dict)

    def begin(self, mask: Tensor, owners: Tensor) -> None:
        """Forget the last pass. `mask` and `owners` are (B, S)."""
        self.mask, self.owners = mask.bool().flatten(), owners.flatten()
        self._terms = {"task": [], "balance": [], "z": []}

    def observe(self, decision: Decision) -> None:
        """One decision of a group; under checkpointing the same sums are formed again."""
        scores, weights, group = decision.scores, decision.weights, decision.group
        if scores is None or self.mask is None or self.owners is None:
            return
        chosen = slice(None) if decision.tokens is None else decision.tokens
        mask, owners = self.mask[chosen], self.owners[chosen]
        if scores.shape[0] != len(mask):
            return
        members = range(decision.start, decision.stop)
        for place, member in enumerate(members):
            present = None if decision.by_rank else group.experts[member]
            self._add(scores[:, place], weights[:, place], present, mask, owners)
        if decision.by_rank and torch.is_grad_enabled() and not decision.replay:
            for place, member in enumerate(members):
                kept = (weights[:, place] != 0) & mask[:, None]
                key = (id(group), member)
                self._groups[id(group)] = group
                self.loads[key] = self.loads.get(key, 0) + kept.sum(0).float()

    def add(self, scores: Tensor, weights: Tensor, present: tuple[int, ...] | None) -> None:
        """Losses of one gate. `present` maps its scores to experts; None for ranks."""
        if self.mask is not None and self.owners is not None:
            self._add(scores, weights, present, self.mask, self.owners)

    def _add(
        self,
        scores: Tensor,
        weights: Tensor,
        present: tuple[int, ...] | None,
        mask: Tensor,
        owners: Tensor,
    ) -> None:
        if not bool(mask.any()):  # an expert of a MoE layer may get padding alone
            return
        scores, weights = scores[mask].float(), weights[mask].float()
        self._terms["z"].append(torch.logsumexp(scores, dim=-1).square().mean())
        probability = torch.softmax(scores[:, : weights.shape[1]], dim=-1).mean(0)
        share = (weights != 0).float().mean(0)
        share = share / share.sum().clamp_min(1e-9)
        self._terms["balance"].append(len(share) * (share * probability).sum())
        if present is None:
            return
        owner = owners[mask]
        place = torch.full((int(max(present)) + 2,), -1, device=owner.device)
        place[list(present)] = torch.arange(len(present), device=owner.device)
        target = place[owner.clamp(max=len(place) - 1)].masked_fill(owner < 0, -1)
        if bool((target >= 0).any()):
            self._terms["task"].append(
                functional.cross_entropy(scores, target.masked_fill(target < 0, -100))
            )

    def mean(self, name: str) -> Tensor | None:
        """Mean of a term over all gates: task (MeteoRA), balance (Switch) or z (ST-MoE)."""
        terms = self._terms.get(name)
        return torch.stack(terms).mean() if terms else None

    @torch.no_grad()
    def move_biases(self, rate: float, processes: Processes) -> None:
        """Selection biases towards even load, then forget the loads (DeepSeek-V3, SMoRA).

        b_j <- b_j + rate * sign(mean load - load_j): ranks chosen too seldom become likelier.
        """
        processes.add_up([*self.loads.values()])
        for (key, member), load in self.loads.items():
            group = self._groups[key]
            bias = group.bias
            if isinstance(bias, Tensor):
                part = bias[group.units[member] : group.units[member + 1]]
                part += rate * torch.sign(load.mean() - load)
        self.loads.clear()
