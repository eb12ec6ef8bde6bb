"""Train a gate, and if wanted its experts; a killed run goes on to the same weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.errors import MethodError
from lora_merge.mixture.formats.experts_in_memory import rebuilt_experts
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import AttachedMixture, load_mixture
from lora_merge.mixture.training.checkpoint import check_work, cut_metrics, restore_state
from lora_merge.mixture.training.data import DataError, Example
from lora_merge.mixture.training.fit_classifier import fit_to_labels
from lora_merge.mixture.training.fit_text import fit_to_texts
from lora_merge.mixture.training.loop import Run
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.mixture.training.sora import check_prunable


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
        work: Directory for the checkpoint alone; `<work>.metrics.jsonl` lies beside it. None keeps
            neither.
        resume: Go on from the checkpoint in `work`, to the very weights of an unbroken run.
        on_step: Called with every step's metrics.

    Returns:
        The mixture with the trained gate; with `train_experts` or `rank_l1` also with new experts,
        in memory.

    Raises:
        MethodError: If there is nothing to train, or the loss is no longer finite.
        DataError: If the rows do not carry what the training needs.
        OutputError: If `work` holds something other than a checkpoint.
    """
    settings = _settled(settings or TrainSettings(), mixture, examples)
    if mixture.spec.signal == "text" and not settings.changes_experts:
        return fit_to_texts(model, mixture, examples)
    by_expert = mixture.spec.standardise
    _check(mixture, examples, settings)
    if work is not None:
        check_work(work, mixture.files, resume=resume)
    # PHATGOOSE trains each vector on its own expert's rows behind a sigmoid, and compares
    # standardised vectors only afterwards (arXiv 2402.05859).
    start = _sigmoid_form(mixture) if by_expert else mixture
    trainable = {p: p.requires_grad for p in model.parameters()}
    was_training = model.training
    dtype = torch.float32 if settings.changes_experts else None  # a half would lose the updates
    attached = load_mixture(model, start, name="training", dtype=dtype)
    try:
        with torch.random.fork_rng():
            run = Run(model, attached, settings, by_expert)
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
    if spec.signal == "text":
        raise MethodError(
            f"the {spec.preset} gate chooses by the prompt alone, whatever the experts are",
            "train them by themselves, or under another gate",
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
