"""Train a gate with its experts frozen; a killed run goes on to the same weights."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.adapters import atomic_directory
from lora_merge.errors import MethodError
from lora_merge.mixture.attach import AttachedMixture, load_mixture
from lora_merge.mixture.data import Batch, DataError, Example, batches, in_order
from lora_merge.mixture.losses import GateLosses
from lora_merge.mixture.mixture import Mixture

_STATE, _METRICS = "state.pt", "metrics.jsonl"


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        batch_size: Rows of one pass.
        accumulate: Passes per step.
        lr: Peak learning rate.
        warmup: Steps of linear warm-up.
        schedule: "cosine" to a tenth of the peak, or "constant".
        weight_decay: AdamW's.
        clip: Largest norm of the gradient; 0 for none.
        task_loss: Coefficient of the gate's own cross-entropy on labelled rows (MeteoRA has 50).
        balance_loss: Coefficient of the load balance loss.
        z_loss: Coefficient of the squared log-partition of the scores.
        bias_rate: Step of a rank gate's selection bias against its load.
        bf16: Autocast the passes to bfloat16; the gate's weights stay float32.
        seed: Of the order of the rows and of dropout.
        save_every: Steps between checkpoints; 0 for none but the last.
        eval_every: Steps between evaluations; 0 for the last step only.
    """

    steps: int = 200
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 10
    schedule: str = "cosine"
    weight_decay: float = 0.01
    clip: float = 1.0
    task_loss: float = 0.0
    balance_loss: float = 0.0
    z_loss: float = 0.0
    bias_rate: float = 0.0
    bf16: bool = False
    seed: int = 0
    save_every: int = 50
    eval_every: int = 0


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
    """Train a mixture's gate in a causal language model; the experts stay as they are.

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
        The mixture with the trained gate.

    Raises:
        MethodError: If the gate has nothing to train, or the loss is no longer finite.
        DataError: If the rows do not carry what the training needs.
    """
    settings = settings or TrainSettings()
    by_expert = mixture.spec.standardise
    _check_rows(mixture, examples, settings)
    # PHATGOOSE trains each vector on its own expert's rows behind a sigmoid, and compares
    # standardised vectors only afterwards (arXiv 2402.05859).
    start = _sigmoid_form(mixture) if by_expert else mixture
    trainable = {p: p.requires_grad for p in model.parameters()}
    was_training = model.training
    attached = load_mixture(model, start, name="training")
    try:
        with torch.random.fork_rng():
            run = _Run(model, attached, settings, by_expert)
            first = run.restore(work) if resume and work is not None else 0
            if work is not None:
                _cut_metrics(_metrics_of(work), first)
            run.go(first, examples, evaluation, work, on_step)
        gate = attached.gate_tensors()
    finally:
        attached.detach()
        model.train(was_training)
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
    return mixture.with_gate(gate, trained=True)


def mean_loss(model: nn.Module, examples: Sequence[Example], *, batch_size: int = 16) -> float:
    """Mean loss per token of a causal language model, as it stands, on rows."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in in_order(examples, batch_size):
            on = batch.to(device)
            tokens = int((on.labels[:, 1:] != -100).sum())
            loss = model(input_ids=on.ids, attention_mask=on.mask, labels=on.labels).loss
            total += float(loss) * tokens
            count += tokens
    model.train(was_training)
    return total / max(count, 1)


class _Run:
    """One training run: model, optimizer and where it is."""

    def __init__(
        self, model: nn.Module, attached: AttachedMixture, settings: TrainSettings, by_expert: bool
    ) -> None:
        self.model, self.attached, self.settings = model, attached, settings
        self.by_expert = by_expert
        self.parameters = attached.train_gate_only()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.losses = GateLosses()
        self.watch = bool(settings.task_loss or settings.balance_loss or settings.z_loss)
        self.device = attached.device
        model.train()
        torch.manual_seed(settings.seed)

    def go(
        self,
        first: int,
        examples: Sequence[Example],
        evaluation: Sequence[Example],
        work: Path | None,
        on_step: Callable[[Mapping[str, Any]], None],
    ) -> None:
        settings = self.settings
        stream = batches(
            examples,
            min(settings.batch_size, len(examples)),
            seed=settings.seed,
            start=first * settings.accumulate,
        )
        for step in range(first + 1, settings.steps + 1):
            began = time.perf_counter()
            metrics = self.step(step, list(islice(stream, settings.accumulate)))
            seconds = time.perf_counter() - began
            metrics["tokens_per_second"] = round(metrics["tokens"] / seconds, 1)
            last = step == settings.steps
            due = last or (settings.eval_every and step % settings.eval_every == 0)
            if evaluation and due:
                metrics["eval_loss"] = mean_loss(self.model, evaluation)
                self.model.train()
            if work is not None:
                if last or (settings.save_every and step % settings.save_every == 0):
                    self.save(work, step)
                with _metrics_of(work).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(metrics) + "\n")
            on_step(metrics)

    def step(self, step: int, parts: Sequence[Batch]) -> dict[str, Any]:
        """One optimizer step."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * _schedule(step, settings)
        sums: dict[str, float] = {}
        counts = [int((part.labels[:, 1:] != -100).sum()) for part in parts]
        for part, count in zip(parts, counts, strict=True):
            share = count / max(sum(counts), 1)  # every token weighs the same, however it is split
            terms = self.terms(part.to(self.device))
            total = sum(_coefficient(settings, name) * term for name, term in terms.items())
            (total * share).backward()  # type: ignore[union-attr]
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + float(term.detach()) * share
        if not all(math.isfinite(value) for value in sums.values()):
            raise MethodError(
                f"step {step}: the loss is not finite ({sums})",
                "lower --lr, or start again without --bf16; the last checkpoint is good",
            )
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip or math.inf))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if settings.bias_rate:
            self.losses.move_biases(settings.bias_rate * _schedule(step, settings))
        rate = self.optimizer.param_groups[0]["lr"]
        return {"step": step, **sums, "lr": rate, "grad_norm": norm, "tokens": sum(counts)}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of one pass by name."""
        context = self.attached.context
        context.only = batch.experts if self.by_expert else None
        watching = self.watch or bool(self.settings.bias_rate)
        if watching:
            self.losses.begin(batch.mask, batch.experts)
            context.observe = self.losses.observe
            if self.attached.two_pass is not None:
                self.attached.two_pass.observe = self.losses.add
        kind = self.device.type
        precision = torch.autocast(kind, torch.bfloat16) if self.settings.bf16 else nullcontext()
        try:
            with precision:
                out = self.model(
                    input_ids=batch.ids,
                    attention_mask=batch.mask,
                    labels=batch.labels,
                    use_cache=False,
                )
        finally:
            context.observe = None
        terms = {"loss": out.loss}
        for name in ("task", "balance", "z"):
            value = self.losses.mean(name) if self.watch else None
            if value is not None:
                terms[name] = value
        return terms

    def save(self, work: Path, step: int) -> None:
        """Write a checkpoint; it appears whole or not at all."""
        state = {
            "step": step,
            "settings": asdict(self.settings),
            "parameters": [p.detach().cpu() for p in self.parameters],
            "biases": [g.bias for g in self.attached.parts if isinstance(g.bias, Tensor)],
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        with atomic_directory(work) as folder:
            torch.save(state, folder / _STATE)
            # Says to `check_target` and to people what this directory is.
            (folder / "config.json").write_text(json.dumps({"lora_merge": "training checkpoint"}))

    def restore(self, work: Path) -> int:
        """Take a checkpoint up; returns its step, 0 if there is none."""
        path = work / _STATE
        if not path.is_file():
            return 0
        state = torch.load(path, map_location="cpu", weights_only=True)
        kept, now = state["settings"], asdict(self.settings)
        changed = [
            k for k in now if kept.get(k) != now[k] and k not in ("save_every", "eval_every")
        ]
        shapes = [tuple(p.shape) for p in state["parameters"]]
        if changed or shapes != [tuple(p.shape) for p in self.parameters]:
            what = ", ".join(changed) or "the mixture"
            raise MethodError(
                f"{work}: the checkpoint belongs to a run with other settings ({what})",
                "give the same settings, or start afresh without --resume",
            )
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
            biased = [g.bias for g in self.attached.parts if isinstance(g.bias, Tensor)]
            for bias, value in zip(biased, state["biases"], strict=True):
                bias.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        return int(state["step"])


def _metrics_of(work: Path) -> Path:
    """Beside the checkpoint, which is replaced as a whole."""
    return work.with_name(f"{work.name}.{_METRICS}")


def _cut_metrics(path: Path, step: int) -> None:
    """Drop what a killed run reported after its last checkpoint: it is about to happen again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut in the middle by the kill
            if row["step"] <= step:
                kept.append(line + "\n")
        path.write_text("".join(kept), encoding="utf-8")


def _schedule(step: int, settings: TrainSettings) -> float:
    """Factor of the learning rate at a step, counted from 1."""
    if step <= settings.warmup:
        return step / max(settings.warmup, 1)
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def _coefficient(settings: TrainSettings, name: str) -> float:
    return 1.0 if name == "loss" else float(getattr(settings, f"{name}_loss"))


def _check_rows(mixture: Mixture, examples: Sequence[Example], settings: TrainSettings) -> None:
    if not examples:
        raise DataError("there are no rows to train on", "give a file with rows")
    labelled = sum(e.expert >= 0 for e in examples)
    if mixture.spec.standardise and labelled < len(examples):
        raise DataError(
            f"{len(examples) - labelled} rows do not name their expert, and phatgoose trains each "
            "vector on its own expert's rows",
            'add "expert" to every row',
        )
    if settings.task_loss and not labelled:
        raise DataError("task_loss needs rows that name their expert", 'add "expert" to rows')
    if settings.task_loss and mixture.spec.granularity == "rank":
        raise MethodError("a rank gate has no expert to be right about", "leave --task-loss out")


def _sigmoid_form(mixture: Mixture) -> Mixture:
    """PHATGOOSE's gate while it trains: sigmoid(v_e . x) of the row's own expert."""
    spec = replace(mixture.spec, value="sigmoid", standardise=False, top_k=None)
    return Mixture.of(spec, mixture.experts, mixture.gate)
