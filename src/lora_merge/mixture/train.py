"""Train a gate, and if wanted its experts; a killed run goes on to the same weights."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.errors import MethodError
from lora_merge.mixture.attach import AttachedMixture, load_mixture
from lora_merge.mixture.data import Batch, DataError, Example, batches, in_order
from lora_merge.mixture.fit import fit_to_labels
from lora_merge.mixture.group import Group
from lora_merge.mixture.losses import GateLosses
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.processes import Processes
from lora_merge.mixture.rebuild import rebuilt_experts
from lora_merge.mixture.settings import TrainSettings
from lora_merge.mixture.sora import add_rank_gates, check_prunable, proximal_step
from lora_merge.mixture.training_state import add_metrics, cut_metrics, restore_state, save_state

_HALVES = (torch.float16, torch.bfloat16)


def train_gate(
    model: nn.Module,
    mixture: Mixture,
    examples: Sequence[Example],
    settings: TrainSettings | None = None,
    *,
    evaluation: Sequence[Example] = (),
    work: Path | None = None,
    resume: bool = False,
    on_step: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Mixture:
    """Train a mixture's gate in a causal language model; the mixture itself stays as it is.

    If torch.distributed runs, every process calls this with the same arguments and gets the same
    result: each takes its share of every batch, and only the first writes to `work`.

    Args:
        model: Base model without a mixture of that kind attached; it is left as it was.
        mixture: Where to start.
        examples: Training rows.
        settings: How to train.
        evaluation: Rows whose loss is reported.
        work: Directory for the checkpoint; `<work>.metrics.jsonl` lies beside it. None keeps
            neither.
        resume: Go on from the checkpoint in `work`, to the very weights of an unbroken run.
        on_step: Called with every step's metrics.

    Returns:
        The mixture with the trained gate; with `train_experts` or `rank_l1` also with new experts,
        in memory.

    Raises:
        MethodError: If there is nothing to train, or the loss is no longer finite.
        DataError: If the rows do not carry what the training needs.
    """
    settings = _settled(settings or TrainSettings(), mixture, examples)
    by_expert = mixture.spec.standardise
    _check(mixture, examples, settings)
    # PHATGOOSE trains each vector on its own expert's rows behind a sigmoid, and compares
    # standardised vectors only afterwards (arXiv 2402.05859).
    start = _sigmoid_form(mixture) if by_expert else mixture
    trainable = {p: p.requires_grad for p in model.parameters()}
    was_training = model.training
    dtype = torch.float32 if settings.changes_experts else None  # a half would lose the updates
    attached = load_mixture(model, start, name="training", dtype=dtype)
    try:
        with torch.random.fork_rng():
            run = _Run(model, attached, settings, by_expert)
            first = 0
            if work is not None:
                first = restore_state(work, settings, *run.state) if resume else 0
                if run.processes.rank == 0:
                    cut_metrics(work, first)
            if settings.task_loss and not first:
                fit_to_labels(model, attached, examples, seed=settings.seed)
                run.processes.follow_first(run.parameters)
            run.go(first, examples, evaluation, work, on_step)
        gate = attached.gate_tensors()
        factors = _factors(attached) if settings.changes_experts else {}
    finally:
        attached.detach()
        model.train(was_training)
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
    experts = rebuilt_experts(mixture, factors) if factors else mixture.experts
    trained = Mixture.of(replace(mixture.spec, trained=True), experts, gate)
    trained.descriptors = mixture.descriptors
    return trained


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


class _Run:
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
        context = self.attached.context
        context.only = batch.owners[:, 0] if self.by_expert else None
        watching = self.watch or bool(self.settings.bias_rate)
        if watching:
            self.losses.begin(batch.mask, batch.owners)
            context.observe = self.losses.observe
            if self.attached.two_pass is not None:
                self.attached.two_pass.observe = self.losses.add
        try:
            with self.precision:
                out = self.model(
                    input_ids=batch.ids,
                    attention_mask=batch.mask,
                    labels=batch.labels,
                    use_cache=False,
                )
        finally:
            context.observe = None
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


def _factors(attached: AttachedMixture) -> dict[str, tuple[Tensor, Tensor]]:
    """Each module's down and up as training left them, rank gates folded into up."""
    found = {}
    for group in attached.parts:
        for index, name in enumerate(group.names):
            units = slice(group.units[index], group.units[index + 1])
            up = getattr(group, f"up{index}").detach()
            if group.rank_gates is not None:
                up = up * group.rank_gates.detach()[units, None]
            found[name] = (group.down.detach()[units], up)
    return found


def _schedule(step: int, settings: TrainSettings) -> float:
    """Factor of the learning rate at a step, counted from 1."""
    if step <= settings.warmup:
        return step / max(settings.warmup, 1)
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def _check(mixture: Mixture, examples: Sequence[Example], settings: TrainSettings) -> None:
    """Refuse what cannot be trained, before any work."""
    spec = mixture.spec
    if not examples:
        raise DataError("there are no rows to train on", "give a file with rows")
    if not spec.is_learned and not settings.changes_experts:
        raise MethodError(
            f"the {spec.preset} gate has nothing to train",
            "train xlora, recall, meteora, smora or phatgoose, or the experts",
        )
    if settings.rank_l1:
        check_prunable(mixture)
    if settings.train_experts and spec.signal == "spectrum":
        raise MethodError(
            f"the {spec.preset} gate is computed from the experts, which would change under it",
            "train the experts under another gate",
        )
    if spec.standardise and any(e.expert < 0 for e in examples):
        unnamed = sum(e.expert < 0 for e in examples)
        raise DataError(
            f"{unnamed} rows do not name their expert, and phatgoose trains each vector on its own "
            "expert's rows",
            'add "expert" to every row',
        )
    if settings.task_loss and not any(e.is_labelled for e in examples):
        raise DataError("task_loss needs rows that name their expert", 'add "expert" to rows')
    if settings.task_loss and spec.granularity == "rank":
        raise MethodError("a rank gate has no expert to be right about", "leave --task-loss out")


def _settled(
    settings: TrainSettings, mixture: Mixture, examples: Sequence[Example]
) -> TrainSettings:
    """The settings with what the caller left open: labels are used where they are."""
    spec, task, lr = mixture.spec, settings.task_loss, settings.lr
    if task is None:
        weighs = spec.is_learned and spec.granularity != "rank" and not spec.standardise
        task = float(weighs and any(e.is_labelled for e in examples))
    if lr is None:
        lr = 2e-3 if spec.granularity == "rank" else 5e-3
        lr = 1e-3 if task and spec.signal == "hidden" else lr
    return replace(settings, task_loss=task, lr=lr)


def _sigmoid_form(mixture: Mixture) -> Mixture:
    """PHATGOOSE's gate while it trains: sigmoid(v_e . x) of the row's own expert."""
    spec = replace(mixture.spec, value="sigmoid", standardise=False, top_k=None)
    return Mixture.of(spec, mixture.experts, mixture.gate)
