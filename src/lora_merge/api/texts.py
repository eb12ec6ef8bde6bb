"""A mixture on texts: which expert speaks where, fewer experts by that, is one missing."""

from collections.abc import Sequence
from typing import Any

from lora_merge.api.inputs import Base, Data, MixtureLike, loaded_base, opened_mixture, read_rows
from lora_merge.arguments import checked
from lora_merge.mixture.insight import consolidate as consolidating
from lora_merge.mixture.insight import novelty as novelties
from lora_merge.mixture.insight.usage import Usage
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.training.base_model import watch_rows


@checked()
def usage(
    mixture: MixtureLike,
    base: Base,
    data: Data,
    *,
    tokenizer: Any = None,
    max_length: int = 512,
    batch_size: int = 8,
    device: str = "auto",
) -> Usage:
    """Which expert speaks where, on texts: runs the mixture over them and counts.

    Args:
        mixture: The mixture.
        base: Base model: directory, Hub id or a loaded model, which is left as it was.
        data: Texts.
        tokenizer: Of a loaded model.
        max_length: Longer rows are cut.
        batch_size: Rows of one pass.
        device: Where a base model is loaded.

    Examples:
        >>> import lora_merge
        >>> mixture = lora_merge.Mixture("examples/adapters/*")
        >>> seen = lora_merge.usage(mixture, "examples/base", "examples/data/test.jsonl")
        >>> seen.experts
        ('double', 'reverse', 'upper')
    """
    opened = opened_mixture(mixture)
    model, reader = loaded_base(base, tokenizer, device)
    rows = read_rows(data, reader, opened, max_length)
    handle = load_mixture(model, opened, name="usage")
    try:
        return watch_rows(model, handle, rows, batch_size)
    finally:
        handle.detach()


@checked()
def consolidate(
    mixture: MixtureLike, usage: Usage, *, experts: int, rank: int | None = None
) -> consolidating.Consolidation:
    """Merge a mixture's experts into a few, by how they are used (after arXiv 2310.01334).

    For one plain adapter without a gate: `export(mixture, out, "static", weights=usage)`.

    Args:
        mixture: What there is.
        usage: From `usage`, on text that matters.
        experts: How many are to remain.
        rank: Largest rank of each; None keeps the members' ranks together, without error.

    Returns:
        The smaller mixture, who went where, and the error of the cut.

    Raises:
        MethodError: If the gate cannot lead groups, or the usage is of another mixture.

    Examples:
        >>> import lora_merge
        >>> mixture = lora_merge.Mixture("examples/adapters/*")
        >>> seen = lora_merge.usage(mixture, "examples/base", "examples/data/test.jsonl")
        >>> small = lora_merge.consolidate(mixture, seen, experts=2)
        >>> sorted(map(len, small.groups))
        [1, 2]
    """
    return consolidating.consolidate(opened_mixture(mixture), usage, experts=experts, rank=rank)


@checked()
def describe(
    mixture: MixtureLike,
    base: Base,
    data: Data,
    *,
    modules: Sequence[str] | None = None,
    rank: int = 8,
    tokenizer: Any = None,
    max_length: int = 512,
    batch_size: int = 8,
    device: str = "auto",
) -> Mixture:
    """Learn what each expert's texts look like (after SEMA, arXiv 2403.18886), for `novelty`.

    Args:
        mixture: The mixture; it stays as it is.
        base: Base model: directory, Hub id or a loaded model.
        data: Rows that name their expert.
        modules: Whose inputs; default: those already described, or one per layer.
        rank: Width of the autoencoder.
        tokenizer: Of a loaded model.
        max_length: Longer rows are cut.
        batch_size: Rows of one pass.
        device: Where a base model is loaded.

    Returns:
        The mixture with descriptors.

    Raises:
        MethodError: If an expert has fewer than four rows, or the modules are not the old ones.

    Examples:
        >>> import lora_merge
        >>> mixture = lora_merge.Mixture("examples/adapters/*")
        >>> known = lora_merge.describe(mixture, "examples/base", "examples/data/test.jsonl")
        >>> known.descriptors.experts
        ('double', 'reverse', 'upper')
    """
    opened = opened_mixture(mixture)
    model, reader = loaded_base(base, tokenizer, device)
    rows = read_rows(data, reader, opened, max_length)
    described = Mixture.of(opened.spec, opened.experts, opened.gate)
    described.descriptors = novelties.describe(
        model, opened, rows, modules=modules, rank=rank, batch_size=batch_size
    )
    return described


@checked()
def novelty(
    mixture: MixtureLike,
    base: Base,
    data: Data,
    *,
    threshold: float = 1.5,
    tokenizer: Any = None,
    max_length: int = 512,
    batch_size: int = 8,
    device: str = "auto",
) -> novelties.Novelty:
    """Whether texts need an expert that a mixture does not have (after SEMA, arXiv 2403.18886).

    Args:
        mixture: A mixture from `describe`.
        base: Base model: directory, Hub id or a loaded model.
        data: Texts of one kind.
        threshold: Deviations above an expert's own texts that are strange.
        tokenizer: Of a loaded model.
        max_length: Longer rows are cut.
        batch_size: Rows of one pass.
        device: Where a base model is loaded.

    Raises:
        MethodError: If the mixture has no descriptors.

    Examples:
        >>> import lora_merge
        >>> mixture = lora_merge.Mixture("examples/adapters/*")
        >>> known = lora_merge.describe(mixture, "examples/base", "examples/data/test.jsonl")
        >>> lora_merge.novelty(known, "examples/base", "examples/data/test.jsonl").experts
        ('double', 'reverse', 'upper')
    """
    opened = opened_mixture(mixture)
    model, reader = loaded_base(base, tokenizer, device)
    rows = read_rows(data, reader, opened, max_length)
    return novelties.novelty(model, opened, rows, threshold=threshold, batch_size=batch_size)
