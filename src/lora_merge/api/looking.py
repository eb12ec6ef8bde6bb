"""Looking at adapters: what they are, their spectra, how they relate, what ranks to keep."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_merge.adapters.access.adapter_like import AdaptersLike
from lora_merge.adapters.access.coerce import open_adapter, open_adapters
from lora_merge.adapters.measured.spectra import AdapterSpectra, adapter_spectra, require_finite
from lora_merge.analysis import compare as comparing
from lora_merge.analysis.beside_base import (
    BaseReport,
    default_cache,
    relate_to_base,
)
from lora_merge.analysis.families import Algorithm, cluster_adapters
from lora_merge.analysis.info import AdapterInfo, describe
from lora_merge.analysis.verdicts import Verdict
from lora_merge.analysis.verdicts import judge as judge_pairs
from lora_merge.api.arguments.reshaping import ChooseRanks
from lora_merge.api.ranking import check_rule, chosen, read_rule, weighed
from lora_merge.arguments import checked, takes
from lora_merge.errors import MethodError
from lora_merge.files.checkpoint import open_checkpoint
from lora_merge.ranks.choose import RankPlan


@checked()
def info(adapter: AdaptersLike, *, on_module: Callable[[], None] | None = None) -> AdapterInfo:
    """Read an adapter through and say what it is.

    Args:
        adapter: One adapter, as `open_adapter` takes it.
        on_module: Called after each module.

    Returns:
        Its base model, modules, norms and oddities.

    Raises:
        AdapterError: If a tensor is not finite; names the module.

    Examples:
        >>> import lora_merge
        >>> about = lora_merge.info("examples/adapters/upper")
        >>> about.base_model, len(about.modules), about.modules[0].rank
        ('examples/base', 14, 8)
    """
    return describe(open_adapter(adapter), on_module=on_module)


@checked()
def spectra(
    adapter: AdaptersLike,
    *,
    modules: Sequence[str] = (),
    keep_cores: bool = False,
    jobs: int | None = None,
    on_module: Callable[[], None] | None = None,
) -> AdapterSpectra:
    """Exact singular values of every module's delta, scaling included, from the factors.

    Args:
        adapter: One adapter, as `open_adapter` takes it.
        modules: Shell patterns; only modules that match one. Default: all.
        keep_cores: Keep each module's r x r SVD, from which any truncation follows.
        jobs: Worker threads.
        on_module: Called after each module.

    Returns:
        One spectrum per module: float64, descending.

    Raises:
        MethodError: If the patterns match no module.

    Examples:
        >>> import lora_merge
        >>> found = lora_merge.spectra("examples/adapters/upper", modules=["0.*.q_proj"])
        >>> found.modules[0].values.shape
        torch.Size([8])
    """
    return adapter_spectra(
        open_adapter(adapter),
        modules=modules,
        keep_cores=keep_cores,
        jobs=jobs,
        on_module=on_module,
    )


@checked()
def spectra_beside_base(
    adapter: AdaptersLike,
    base: str | os.PathLike[str],
    *,
    modules: Sequence[str] = (),
    intruders: bool = False,
    jobs: int | None = None,
) -> BaseReport:
    """An adapter's deltas beside the weights they change: size, amplification, intruders.

    Args:
        adapter: One adapter, as `open_adapter` takes it.
        base: Directory of the base model, in safetensors.
        modules: Shell patterns; only modules that match one. Default: all.
        intruders: Count intruder dimensions (arXiv 2410.21228), too.
        jobs: Worker threads.

    Raises:
        SourceError: If the base is no safetensors checkpoint.
        AdapterError: If a weight does not fit its module.

    Examples:
        >>> import lora_merge
        >>> report = lora_merge.spectra_beside_base("examples/adapters/upper", "examples/base")
        >>> len(report.relations)
        14
    """
    opened = open_adapter(adapter)
    found = adapter_spectra(opened, modules=modules, keep_cores=True, jobs=jobs)
    return relate_to_base(
        opened,
        found,
        open_checkpoint(Path(base)),
        intruders=intruders,
        cache=default_cache(),
        jobs=jobs,
    )


@checked()
def compare(
    adapters: AdaptersLike,
    *,
    modules: Sequence[str] = (),
    angles: bool = False,
    accept_base_models: bool = False,
    seed: int = 0,
    jobs: int | None = None,
    on_module: Callable[[], None] | None = None,
) -> comparing.Comparison:
    """Compare all pairs of adapters on their deltas, without forming them.

    Args:
        adapters: At least two, as `open_adapters` takes them.
        modules: Shell patterns; only modules that match one. Default: all.
        angles: Keep every module's principal cosines, not only the largest.
        accept_base_models: Accept different base model names.
        seed: Of the sampled sign conflicts.
        jobs: Worker threads.
        on_module: Called after each module.

    Returns:
        Matrices over all pairs; `judge` says what they mean for merging, `group` who belongs
        together.

    Raises:
        MethodError: If there are fewer than two adapters, or the patterns match no module.
        AlignmentError: If they do not fit together.

    Examples:
        >>> import lora_merge
        >>> comparison = lora_merge.compare("examples/adapters/*")
        >>> comparison.total.cosine.shape
        torch.Size([3, 3])
    """
    return comparing.compare(
        open_adapters(adapters),
        modules=modules,
        angles=angles,
        accept_base_models=accept_base_models,
        seed=seed,
        jobs=jobs,
        on_module=on_module,
    )


@checked()
def judge(comparison: comparing.Comparison) -> list[Verdict]:
    """What a comparison means for merging, pair by pair: what can be averaged, what conflicts.

    Args:
        comparison: From `compare`.

    Returns:
        One verdict per pair, the most alarming first.

    Examples:
        >>> import lora_merge
        >>> verdicts = lora_merge.judge(lora_merge.compare("examples/adapters/*"))
        >>> [verdict.kind for verdict in verdicts]
        ['independent', 'independent', 'independent']
    """
    return judge_pairs(comparison)


@checked()
def group(
    comparison: comparing.Comparison,
    groups: int | None = None,
    *,
    algorithm: Algorithm = "agglomerative",
) -> list[int]:
    """Group adapters by the cosine of their deltas.

    Args:
        comparison: From `compare`.
        groups: How many; default: the number with the best silhouette.
        algorithm: "agglomerative" or "spectral".

    Returns:
        Group number of every adapter, in the comparison's order.

    Raises:
        MethodError: If there are fewer adapters than groups.

    Examples:
        >>> import lora_merge
        >>> lora_merge.group(lora_merge.compare("examples/adapters/*"), 3)
        [0, 1, 2]
    """
    return cluster_adapters(comparison.total.cosine, groups, algorithm=algorithm)


@takes(ChooseRanks)
def choose_ranks(given: ChooseRanks) -> RankPlan:
    """Choose a rank for every module of an adapter from its spectra; `resize` takes the plan.

    Returns:
        The ranks and what they keep.

    Raises:
        AdapterError: If a module is not finite.
        MethodError: If the rule cannot be met.

    Examples:
        >>> import lora_merge
        >>> plan = lora_merge.choose_ranks("examples/adapters/upper", "budget:x0.5")
        >>> plan.parameters <= plan.parameters_before / 2
        True
    """
    rule = read_rule(given.rule)
    check_rule(rule, given)
    if isinstance(given.adapter, AdapterSpectra):
        if given.bottleneck or given.fisher or given.base:
            raise MethodError("statistics and a base need the adapter, not its spectra", "give it")
        require_finite(given.adapter)
        return chosen(None, given.adapter, rule, given)
    adapter = open_adapter(given.adapter, **given.opening)
    return chosen(adapter, weighed(adapter, adapter_spectra(adapter), given), rule, given)
