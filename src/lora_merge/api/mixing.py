"""Mixtures: grow and import them, train them, and write them for others."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.access.coerce import open_adapters
from lora_merge.api.arguments import mixing as takes_of
from lora_merge.api.arguments.mixing import Kind
from lora_merge.api.arguments.texts import Train
from lora_merge.api.inputs import check_data, check_out, loaded_base, opened_mixture, read_rows
from lora_merge.api.mixture_like import Data
from lora_merge.arguments import takes
from lora_merge.errors import ArgumentError
from lora_merge.mixture import append
from lora_merge.mixture.formats.meteora import import_checkpoint
from lora_merge.mixture.formats.plain import export_experts, export_static
from lora_merge.mixture.formats.xlora import export_xlora
from lora_merge.mixture.fresh import fresh_adapters
from lora_merge.mixture.insight.usage import Usage
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.training.base_model import layer_order, linear_modules
from lora_merge.mixture.training.data import Example
from lora_merge.mixture.training.processes import is_launched, join, shard
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.mixture.training.train import train_gate
from lora_merge.planning import counted
from lora_merge.printing import Report, Summary


@dataclass(frozen=True, repr=False)
class Exported(Report):
    """What an export wrote.

    Attributes:
        out: The directory.
        kind: What is in it.
        folders: The adapter folders.
        error: Relative Frobenius error of the cut to a rank; 0 where nothing was cut.
    """

    out: Path
    kind: Kind
    folders: tuple[Path, ...]
    error: float = 0.0

    def summary(self) -> Summary:
        """What lies where, and the error."""
        facts = [("folder", str(folder)) for folder in self.folders[:16]]
        if self.error:
            facts.append(("cut", f"{100 * self.error:.2g} % of the norm"))
        return Summary(f"Exported as {self.kind}", tuple(facts))

    def rows(self) -> list[dict[str, Any]]:
        """One row per folder."""
        return [{"folder": str(folder)} for folder in self.folders]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"schema": 1, "out": str(self.out), "kind": self.kind, "error": self.error}


@takes(takes_of.AppendExperts)
def append_experts(given: takes_of.AppendExperts) -> Mixture:
    """A mixture with more experts; rows of the old ones keep every bit.

    Raises:
        AlignmentError: If they do not fit the old ones.

    Examples:
        >>> import lora_merge
        >>> two = lora_merge.Mixture(["examples/adapters/upper", "examples/adapters/double"])
        >>> lora_merge.append_experts(two, "examples/adapters/reverse").names
        ['upper', 'double', 'reverse']
    """
    return append.append_experts(
        opened_mixture(given.mixture),
        open_adapters(given.adapters),
        names=given.names,
        seed=given.seed,
        accept_base_models=given.accept_base_models,
    )


@takes(takes_of.FreshMixture)
def fresh_mixture(given: takes_of.FreshMixture) -> Mixture:
    """A mixture of new experts, to be trained from scratch (`train_experts`).

    One expert behind "smora" is SMoRA as its paper has it: a LoRA whose every rank is an expert.
    One behind "constant" is a plain LoRA. Heads and stacks of MoE experts are left out.

    Raises:
        MethodError: If the gate cannot be what was asked for.
        SourceError: If there is no such base.

    Examples:
        >>> import lora_merge
        >>> start = lora_merge.fresh_mixture("examples/base", 8, settings={"top_k": 2})
        >>> start.names, start.spec.preset
        (['fresh'], 'smora')
    """
    base = os.fspath(given.base)
    named = Path(base).name if Path(base).exists() else base
    experts = fresh_adapters(
        linear_modules(base), given.rank, given.names, base=named, seed=given.seed
    )
    return Mixture(
        experts,
        given.preset,
        names=list(given.names),
        seed=given.seed,
        hidden_size=given.hidden_size,
        **dict(given.settings or {}),
    )


@takes(takes_of.ImportMixture)
def import_mixture(given: takes_of.ImportMixture) -> Mixture:
    """Read a mixture that another tool saved: an X-LoRA directory or a MeteoRA file.

    Raises:
        AdapterError: If it is neither.

    Examples:
        >>> import lora_merge
        >>> lora_merge.import_mixture("examples/adapters/upper/nothing.safetensors")
        Traceback (most recent call last):
        lora_merge.errors.AdapterError: examples/adapters/upper/nothing.safetensors: no such file...
    """
    opened = open_adapters(given.experts, allow_pickle=given.allow_pickle)
    places = [a.source.ref if a.source else a.name for a in opened]
    return import_checkpoint(
        Path(given.checkpoint),
        experts=places,
        base=None if given.base is None else os.fspath(given.base),
        top_k=given.top_k,
        temperature=given.temperature,
        allow_pickle=given.allow_pickle,
    )


@takes(Train)
def train(given: Train) -> Mixture:
    """Train a mixture's gate; with the settings also its experts, or which ranks they keep.

    Processes that torchrun or accelerate started train together: each calls this and gets the same.

    Returns:
        The trained mixture.

    Raises:
        MethodError: If there is nothing to train, or the loss is no longer finite.
        DataError: If the rows do not carry what the training needs.

    Examples:
        >>> import lora_merge
        >>> start = lora_merge.Mixture("examples/adapters/*", "meteora")
        >>> done = lora_merge.train(start, "examples/base", "examples/data/train.jsonl",
        ...                         lora_merge.TrainSettings(steps=1))
        >>> done.spec.trained
        True
    """
    if given.shard and not is_launched():
        raise ArgumentError("shard spreads the base over processes", "start several")
    check_data(given.data)
    check_data(given.evaluation)
    start = opened_mixture(given.mixture)
    device = str(join(cpu=given.device == "cpu")) if is_launched() else given.device
    model, reader = loaded_base(given.base, given.tokenizer, "cpu" if given.shard else device)
    if given.shard:
        shard(model, torch.device(device))
    settings = given.settings or TrainSettings()
    step = counted(given.progress, "training", settings.steps)

    def read(data: Data) -> Sequence[Example]:
        return read_rows(
            data, reader, start, given.max_length, strict=given.strict, on_data=given.on_data
        )

    def on_step(metrics: Mapping[str, Any]) -> None:
        step()
        if given.on_step is not None:
            given.on_step(metrics)

    return train_gate(
        model,
        start,
        read(given.data),
        settings,
        evaluation=read(given.evaluation) if given.evaluation else (),
        work=None if given.work is None else Path(given.work),
        resume=given.resume,
        on_step=on_step,
    )


@takes(takes_of.Export)
def export(given: takes_of.Export) -> Exported:
    """Write a mixture for tools that know no gates.

    Raises:
        MethodError: If arguments do not go together, or the mixture has no such form.
        OutputError: If `out` cannot be written; nothing is left behind.

    Examples:
        >>> import lora_merge
        >>> mixture = lora_merge.Mixture("examples/adapters/*")
        >>> lora_merge.export(mixture, "static", "static", weights=[1, 0, 0]).error
        0.0
    """
    if given.to != "static" and (given.weights is not None or given.rank is not None):
        raise ArgumentError("weights and rank belong to static", "leave them out")
    if (given.base is not None) != (given.to == "xlora"):
        raise ArgumentError("xlora needs base, and nothing else does", "give it there alone")
    check_out(given.out, given.mixture, given.base, force=given.force)
    mixture, out = opened_mixture(given.mixture), Path(given.out)
    if given.to == "experts":
        return Exported(out, "experts", tuple(export_experts(mixture, out, force=given.force)))
    if given.base is not None:
        export_xlora(
            mixture, out, layer_order(os.fspath(given.base), mixture.modules), force=given.force
        )
        return Exported(out, "xlora", (out,))
    seen = given.weights
    table: Sequence[float] | Mapping[str, Tensor] | None
    table = seen.mean_weights() if isinstance(seen, Usage) else seen
    error = export_static(mixture, out, weights=table, rank=given.rank, force=given.force)
    return Exported(out, "static", (out,), error)
