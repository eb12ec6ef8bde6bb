"""Mixtures: grow and import them, train them, and write them for others."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lora_merge.adapters.access.adapter_like import AdaptersLike
from lora_merge.adapters.access.coerce import open_adapters
from lora_merge.api.inputs import Base, Data, MixtureLike, loaded_base, opened_mixture, read_rows
from lora_merge.arguments import checked, nearest
from lora_merge.errors import MethodError
from lora_merge.mixture import append
from lora_merge.mixture.formats.meteora import import_checkpoint
from lora_merge.mixture.formats.plain import export_experts, export_static
from lora_merge.mixture.formats.xlora import export_xlora
from lora_merge.mixture.fresh import fresh_adapters
from lora_merge.mixture.insight.usage import Usage
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.training.base_model import layer_order, linear_modules
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.mixture.training.train import train_gate

Kind = Literal["experts", "static", "xlora"]


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        folders: The adapter folders.
        error: Relative Frobenius error of the cut to a rank; 0 where nothing was cut.
    """

    folders: tuple[Path, ...]
    error: float = 0.0


@checked()
def append_experts(
    mixture: MixtureLike,
    adapters: AdaptersLike,
    *,
    names: Sequence[str] | None = None,
    seed: int = 0,
    accept_base_models: bool = False,
) -> Mixture:
    """A mixture with more experts; rows of the old ones keep every bit.

    Args:
        mixture: What there is.
        adapters: New experts, as `open_adapters` takes them.
        names: Their names.
        seed: Of the rows of modules that no expert touched before.
        accept_base_models: Accept experts that name different base models.

    Raises:
        AlignmentError: If they do not fit the old ones.

    Examples:
        >>> import lora_merge
        >>> two = lora_merge.Mixture(["examples/adapters/upper", "examples/adapters/double"])
        >>> lora_merge.append_experts(two, "examples/adapters/reverse").names
        ['upper', 'double', 'reverse']
    """
    return append.append_experts(
        opened_mixture(mixture),
        open_adapters(adapters),
        names=names,
        seed=seed,
        accept_base_models=accept_base_models,
    )


def fresh_mixture(
    base: str,
    rank: int,
    preset: str = "smora",
    *,
    names: Sequence[str] = ("fresh",),
    seed: int = 0,
    hidden_size: int | None = None,
    **settings: Any,
) -> Mixture:
    """A mixture of new experts, to be trained from scratch (`train_experts`).

    One expert behind "smora" is SMoRA as its paper has it: a LoRA whose every rank is an expert.
    One behind "constant" is a plain LoRA.

    Args:
        base: Base model: a directory or a Hub id, of which the config is read.
        rank: Of every expert in every linear module (heads and stacks of MoE experts are left out).
        preset: The gate.
        names: One per expert.
        seed: Of what is drawn.
        hidden_size: Width of the base model's hidden state (X-LoRA), where modules do not tell.
        settings: Of the gate, such as `top_k`.

    Raises:
        MethodError: If the gate cannot be what was asked for.
        SourceError: If there is no such base.

    Example:
        >>> import lora_merge
        >>> start = lora_merge.fresh_mixture("examples/base", 8, top_k=2)
        >>> start.names, start.spec.preset
        (['fresh'], 'smora')
    """
    named = Path(base).name if Path(base).exists() else base
    experts = fresh_adapters(linear_modules(base), rank, names, base=named, seed=seed)
    return Mixture(
        experts, preset, names=list(names), seed=seed, hidden_size=hidden_size, **settings
    )


@checked()
def import_mixture(
    checkpoint: str | os.PathLike[str],
    experts: AdaptersLike = (),
    *,
    base: str | None = None,
    top_k: int | None = None,
    temperature: float | None = None,
    allow_pickle: bool = False,
) -> Mixture:
    """Read a mixture that another tool saved: an X-LoRA directory or a MeteoRA file.

    Args:
        checkpoint: Directory (X-LoRA) or file (MeteoRA).
        experts: References to its adapters in its order, where they are elsewhere.
        base: Base model, for X-LoRA's order of layers.
        top_k: MeteoRA's, which no checkpoint records.
        temperature: The same.
        allow_pickle: Read X-LoRA's classifier from a `.pt` file.

    Raises:
        AdapterError: If it is neither.

    Examples:
        >>> import lora_merge
        >>> lora_merge.import_mixture("examples/adapters/upper/nothing.safetensors")
        Traceback (most recent call last):
        lora_merge.errors.AdapterError: examples/adapters/upper/nothing.safetensors: no such file...
    """
    opened = open_adapters(experts)
    places = [a.source.ref if a.source else a.name for a in opened]
    return import_checkpoint(
        Path(checkpoint),
        experts=places,
        base=base,
        top_k=top_k,
        temperature=temperature,
        allow_pickle=allow_pickle,
    )


@checked()
def train(
    mixture: MixtureLike,
    base: Base,
    data: Data,
    settings: TrainSettings | None = None,
    *,
    tokenizer: Any = None,
    evaluation: Data = (),
    max_length: int = 1024,
    strict: bool = False,
    device: str = "auto",
    work: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_step: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Mixture:
    """Train a mixture's gate; with the settings also its experts, or which ranks they keep.

    Args:
        mixture: Where to start; it stays as it is.
        base: Base model: directory, Hub id or a loaded model.
        data: Training rows.
        settings: How to train.
        tokenizer: Of a loaded model.
        evaluation: Rows whose loss is reported.
        max_length: Longer rows are cut.
        strict: Refuse the data if any row is bad; else bad rows are left out.
        device: Where a base model is loaded.
        work: Directory for the checkpoint; default: none is kept.
        resume: Go on from the checkpoint in `work`, to the weights of an unbroken run.
        on_step: Called with every step's metrics.

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
    start = opened_mixture(mixture)
    model, reader = loaded_base(base, tokenizer, device)
    return train_gate(
        model,
        start,
        read_rows(data, reader, start, max_length, strict),
        settings,
        evaluation=read_rows(evaluation, reader, start, max_length, strict),
        work=None if work is None else Path(work),
        resume=resume,
        on_step=on_step,
    )


@checked()
def export(
    mixture: MixtureLike,
    out: str | os.PathLike[str],
    to: Kind,
    *,
    weights: Sequence[float] | Usage | None = None,
    rank: int | None = None,
    base: str | None = None,
    force: bool = False,
) -> Exported:
    """Write a mixture for tools that know no gates.

    Args:
        mixture: The mixture.
        out: The directory to make.
        to: "experts": one LoRA folder per expert; "static": one LoRA, the gate held still;
            "xlora": PEFT's X-LoRA layout, as PEFT 0.19 and earlier read it.
        weights: For "static": one per expert, or the usage whose mean weights they are; default:
            1 / N each.
        rank: For "static": largest rank; default: all, which is exact.
        base: For "xlora": base model, whose class tells the order of layers.
        force: Replace an adapter directory that is there.

    Raises:
        MethodError: If arguments do not go together, or the mixture has no such form.
        OutputError: If `out` cannot be written; nothing is left behind.

    Examples:
        >>> import lora_merge
        >>> mixture = lora_merge.Mixture("examples/adapters/*")
        >>> lora_merge.export(mixture, "static", "static", weights=[1, 0, 0]).error
        0.0
    """
    kinds = ("experts", "static", "xlora")
    if to not in kinds:
        raise MethodError(f"to is {to!r}", nearest(to, kinds))
    if to != "static" and (weights is not None or rank is not None):
        raise MethodError("weights and rank belong to 'static'", "leave them out")
    if (base is not None) != (to == "xlora"):
        raise MethodError("'xlora' needs base, and nothing else does", "give it there alone")
    opened, folder = opened_mixture(mixture), Path(out)
    if to == "experts":
        return Exported(tuple(export_experts(opened, folder, force=force)))
    if base is not None:
        export_xlora(opened, folder, layer_order(base, opened.modules), force=force)
        return Exported((folder,))
    table: Sequence[float] | Mapping[str, Tensor] | None
    table = weights.mean_weights() if isinstance(weights, Usage) else weights
    error = export_static(opened, folder, weights=table, rank=rank, force=force)
    return Exported((folder,), error)
