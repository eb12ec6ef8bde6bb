"""One training run: passes, losses and steps, on this process's share of the rows."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.errors import MethodError
from lora_merge.mixture.runtime.attach import AttachedMixture
from lora_merge.mixture.runtime.wrapped.group import Group
from lora_merge.mixture.training.checkpoint import add_metrics, save_state
from lora_merge.mixture.training.data import Batch, Example, batches, in_order
from lora_merge.mixture.training.losses import GateLosses
from lora_merge.mixture.training.processes import Processes
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.mixture.training.sora import add_rank_gates, proximal_step

_HALVES = (torch.float16, torch.bfloat16)


def mean_loss(model: nn.Module, examples: Sequence[Example], *, batch_size: int = 16) -> float:
    """Mean loss per token of a causal language model, as it stands, on rows."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in in_order(examples, batch_size):
            on = batch.to(device)
            loss = model(input_ids=on.ids, attention_mask=on.mask, labels=on.labels).loss
            total += float(loss) * batch.num_targets
            count += batch.num_targets
    model.train(was_training)
    return total / max(count, 1)


class Run:
    """One training run: model, optimizer and what they train."""

    def __init__(
        self, model: nn.Module, attached: AttachedMixture, settings: TrainSettings, by_expert: bool
    ) -> None:
        self.model, self.attached, self.settings = model, attached, settings
        self.by_expert = by_expert
        self.processes = Processes.current()
        self.device = attached.device
        spec = attached.mixture.spec
        model.requires_grad_(False)
        gate = attached.train_gate_only() if spec.is_learned else []
        experts = _train_factors(attached.parts) if settings.train_experts else []
        self.rank_gates = add_rank_gates(attached.parts) if settings.rank_l1 else []
        self.parameters = gate + experts
        parts: list[dict[str, Any]] = [
            {"params": gate, "peak": settings.lr, "weight_decay": settings.weight_decay},
            {"params": experts, "peak": settings.expert_lr, "weight_decay": 0.0},
        ]
        parts = [part for part in parts if part["params"]]
        self.optimizer = torch.optim.AdamW(parts) if parts else None
        biases = [g.bias for g in attached.parts if isinstance(g.bias, Tensor)]
        self.state = ([*self.parameters, *self.rank_gates, *biases], self.optimizer)
        self.losses = GateLosses()
        self.watch = bool(settings.task_loss or settings.balance_loss or settings.z_loss)
        half = next(
            (p.dtype in _HALVES for p in model.parameters() if p.is_floating_point()), False
        )
        mixed = settings.bf16 or (half and settings.changes_experts)
        kind = self.device.type
        self.precision = torch.autocast(kind, torch.bfloat16) if mixed else nullcontext()
        model.train()

    def go(
        self,
        first: int,
        examples: Sequence[Example],
        evaluation: Sequence[Example],
        work: Path | None,
        on_step: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """Run the steps after `first`."""
        settings, processes = self.settings, self.processes
        size = min(settings.batch_size, len(examples))
        if size < processes.count:
            raise MethodError(
                f"batches of {size} rows for {processes.count} processes", "raise --batch-size"
            )
        stream = batches(
            examples, size, seed=settings.seed, start=first * settings.accumulate,
            rank=processes.rank, of=processes.count,
        )  # fmt: skip
        for step in range(first + 1, settings.steps + 1):
            began = time.perf_counter()
            metrics = self.step(step, list(islice(stream, settings.accumulate)))
            seconds = time.perf_counter() - began
            metrics["tokens_per_second"] = round(metrics["tokens"] / seconds, 1)
            last = step == settings.steps
            due = last or (settings.eval_every and step % settings.eval_every == 0)
            if evaluation and due:  # on every process: a sharded base needs all of them
                metrics["eval_loss"] = mean_loss(self.model, evaluation)
            if work is not None and processes.rank == 0:
                if last or (settings.save_every and step % settings.save_every == 0):
                    save_state(work, step, settings, *self.state)
                add_metrics(work, metrics)
            on_step(metrics)
        processes.wait()

    def step(self, step: int, parts: Sequence[Batch]) -> dict[str, Any]:
        """One optimizer step on this process's share of the rows."""
        settings = self.settings
        # Dropout depends on the step alone, so that a resumed run needs no generator's state.
        torch.manual_seed((settings.seed * 1_000_003 + step) * 4096 + self.processes.rank)
        counts = torch.stack([part.counts() for part in parts]).to(self.device)
        total = counts.sum(0)
        self.processes.add_up([total])
        sums = self._backward(parts, counts / total.clamp_min(1))
        if not all(math.isfinite(value) for value in sums.values()):
            raise MethodError(
                f"step {step}: the loss is not finite ({sums})",
                "lower --lr, or start again without --bf16; the last checkpoint is good",
            )
        factor = _schedule(step, settings)
        norm = self._update(factor)
        if settings.bias_rate:
            self.losses.move_biases(settings.bias_rate * factor, self.processes)
        rate = (settings.lr or 0.0) * factor
        metrics = {"step": step, **sums, "lr": rate, "grad_norm": norm, "tokens": int(total[0])}
        if self.rank_gates:
            metrics["ranks"] = sum(int((r != 0).sum()) for r in self.rank_gates)
        return metrics

    def _backward(self, parts: Sequence[Batch], shares: Tensor) -> dict[str, float]:
        """Gradients of all rows of all processes; every token weighs the same, however split.

        Args:
            parts: This process's passes.
            shares: Of what all passes of all processes count together, shape (passes, 3).
        """
        sums: dict[str, Tensor] = {}
        for part, (targets, labelled, tokens) in zip(parts, shares, strict=True):
            terms = self.terms(part.to(self.device))
            weights = {"loss": targets, "task": labelled, "balance": tokens, "z": tokens}
            scaled = {name: term.float() * weights[name] for name, term in terms.items()}
            loss = sum(self.settings.of_loss(name) * term for name, term in scaled.items())
            loss.backward()
            for name, term in scaled.items():
                sums[name] = sums.get(name, 0.0) + term.detach()
        trained = [*self.parameters, *self.rank_gates]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in trained if p.grad is not None]
        self.processes.add_up([*gradients, *sums.values()])
        return {name: float(value) for name, value in sums.items()}

    def _update(self, factor: float) -> float:
        """Move everything that trains by its gradient; returns the gradient's norm."""
        settings, norm = self.settings, 0.0
        if self.optimizer is not None:
            clip = settings.clip or math.inf
            norm = float(nn.utils.clip_grad_norm_(self.parameters, clip))
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        proximal_step(self.rank_gates, settings.rank_step * factor, settings.rank_l1)
        return norm

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of one pass by name."""
        looks: dict[str, Any] = {}
        if self.watch or bool(self.settings.bias_rate):
            self.losses.begin(batch.mask, batch.owners)
            looks = {"observe": self.losses.observe, "observe_hidden": self.losses.add}
        only = batch.owners[:, 0] if self.by_expert else None
        with self.attached.using(only=only, **looks), self.precision:
            out = self.model(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                labels=batch.labels,
                use_cache=False,
            )
        terms = {"loss": out.loss}
        if self.watch:
            for name in ("task", "balance", "z"):
                value = self.losses.mean(name)
                terms[name] = out.loss.new_zeros(()) if value is None else value
        return terms


def _train_factors(groups: Sequence[Group]) -> list[nn.Parameter]:
    """Let gradients into every expert's factors; returns them."""
    factors = [group.down for group in groups]
    factors += [getattr(g, f"up{index}") for g in groups for index in range(len(g.names))]
    for factor in factors:
        factor.requires_grad_(True)
    return factors


def _schedule(step: int, settings: TrainSettings) -> float:
    """Factor of the learning rate at a step, counted from 1."""
    if step <= settings.warmup:
        return step / max(settings.warmup, 1)
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
