"""A mixture on texts: which expert speaks where, fewer experts by that, is one missing."""

from dataclasses import fields
from pathlib import Path

from lora_merge.api.arguments import texts as takes_of
from lora_merge.api.inputs import check_out, opened_mixture, opened_texts
from lora_merge.arguments import takes
from lora_merge.errors import ArgumentError
from lora_merge.mixture.formats.plain import export_static
from lora_merge.mixture.insight import consolidate as consolidating
from lora_merge.mixture.insight import novelty as novelties
from lora_merge.mixture.insight.usage import Usage
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.training.base_model import watch_rows


@takes(takes_of.Usage)
def usage(given: takes_of.Usage) -> Usage:
    """Which expert speaks where, on texts: runs the mixture over them and counts.

    A loaded model is left as it was.

    Examples:
        >>> import lora_merge
        >>> mixture = lora_merge.Mixture("examples/adapters/*")
        >>> seen = lora_merge.usage(mixture, "examples/base", "examples/data/test.jsonl")
        >>> seen.experts
        ('double', 'reverse', 'upper')
    """
    return _seen(given, by_label=given.by_label)


def _seen(given: takes_of.Texts, *, by_label: bool = False) -> Usage:
    mixture, model, rows = opened_texts(given)
    handle = load_mixture(model, mixture, name="usage")
    try:
        seen = watch_rows(model, handle, rows, given.batch_size)
        labels = {row.expert for row in rows if row.expert >= 0} if by_label else ()
        for label in sorted(labels):
            members = [row for row in rows if row.expert == label]
            seen.labels[mixture.names[label]] = watch_rows(model, handle, members, given.batch_size)
        return seen
    finally:
        handle.detach()


@takes(takes_of.Consolidate)
def consolidate(given: takes_of.Consolidate) -> consolidating.Consolidation:
    """Merge a mixture's experts into a few, by how they are used (after arXiv 2310.01334).

    What is written of one expert is a plain LoRA adapter: the mixture held still at its mean
    weights, without a gate.

    Returns:
        The smaller mixture, who went where, and the error of the cut.

    Raises:
        ArgumentError: If there is neither a usage nor base and data to measure it.
        MethodError: If the gate cannot lead groups, or the usage is of another mixture.
        OutputError: If `out` cannot be written; nothing is left behind.

    Examples:
        >>> import lora_merge
        >>> mixture = lora_merge.Mixture("examples/adapters/*")
        >>> seen = lora_merge.usage(mixture, "examples/base", "examples/data/test.jsonl")
        >>> small = lora_merge.consolidate(mixture, seen, experts=2)
        >>> sorted(map(len, small.groups))
        [1, 2]
    """
    check_out(given.out, given.mixture, given.base, given.data, force=given.force)
    mixture = opened_mixture(given.mixture)
    out = None if given.out is None else Path(given.out)
    plain = given.experts == 1 and out is not None
    if not plain:
        consolidating.check_groups(mixture, given.experts)
    seen = given.usage or _measured(mixture, given)
    if plain and out is not None:
        weights = seen.mean_weights()
        error = export_static(mixture, out, weights=weights, rank=given.rank, force=given.force)
        return consolidating.Consolidation(None, (tuple(mixture.names),), error)
    done = consolidating.consolidate(mixture, seen, experts=given.experts, rank=given.rank)
    if out is not None and done.mixture is not None:
        done.mixture.save_pretrained(out, force=given.force)
    return done


def _measured(mixture: Mixture, given: takes_of.Consolidate) -> Usage:
    if given.base is None or given.data is None:
        raise ArgumentError(
            "consolidate() has to know how the experts are used",
            "give usage, or base and data to measure it",
        )
    shared = {spec.name: getattr(given, spec.name) for spec in fields(takes_of.TextOptions)}
    return _seen(takes_of.Texts(mixture, given.base, given.data, **shared))


@takes(takes_of.Describe)
def describe(given: takes_of.Describe) -> Mixture:
    """Learn what each expert's texts look like (after SEMA, arXiv 2403.18886), for `novelty`.

    The rows name their expert.

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
    mixture, model, rows = opened_texts(given)
    described = Mixture.of(mixture.spec, mixture.experts, mixture.gate)
    described.descriptors = novelties.describe(
        model,
        mixture,
        rows,
        modules=given.modules,
        rank=given.rank,
        batch_size=given.batch_size,
    )
    return described


@takes(takes_of.Novelty)
def novelty(given: takes_of.Novelty) -> novelties.Novelty:
    """Whether texts need an expert that a mixture does not have (after SEMA, arXiv 2403.18886).

    The mixture is one from `describe`, the texts are of one kind.

    Raises:
        MethodError: If the mixture has no descriptors.

    Examples:
        >>> import lora_merge
        >>> mixture = lora_merge.Mixture("examples/adapters/*")
        >>> known = lora_merge.describe(mixture, "examples/base", "examples/data/test.jsonl")
        >>> lora_merge.novelty(known, "examples/base", "examples/data/test.jsonl").experts
        ('double', 'reverse', 'upper')
    """
    mixture, model, rows = opened_texts(given)
    return novelties.novelty(
        model, mixture, rows, threshold=given.threshold, batch_size=given.batch_size
    )
