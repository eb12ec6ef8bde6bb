"""Looking at adapters: what they are, their spectra, how they relate, what ranks to keep."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from lora_merge.adapters.access.coerce import AdaptersLike, open_adapter, open_adapters
from lora_merge.adapters.measured.spectra import AdapterSpectra, adapter_spectra, require_finite
from lora_merge.analysis import compare as comparing
from lora_merge.analysis.beside_base import (
    BaseReport,
    base_weights,
    default_cache,
    relate_to_base,
)
from lora_merge.analysis.families import Algorithm, cluster_adapters
from lora_merge.analysis.info import AdapterInfo, describe
from lora_merge.analysis.verdicts import Verdict
from lora_merge.analysis.verdicts import judge as judge_pairs
from lora_merge.analysis.weighted_spectra import read_moments, weigh_spectra
from lora_merge.arguments import checked
from lora_merge.errors import MethodError
from lora_merge.files.checkpoint import open_checkpoint
from lora_merge.ranks.choose import RankPlan
from lora_merge.ranks.choose import choose_ranks as choose_from_spectra
from lora_merge.ranks.rule import RankRule

Objective = Literal["absolute", "relative", "base-relative"]


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


@checked()
def choose_ranks(
    adapter: AdaptersLike | AdapterSpectra,
    rule: RankRule | str = "energy:0.95",
    *,
    min_rank: int = 1,
    max_rank: int | None = None,
    round_to: int = 1,
    objective: Objective = "absolute",
    base: str | os.PathLike[str] | None = None,
    exact: bool = False,
    bottleneck: str | os.PathLike[str] | None = None,
    fisher: str | os.PathLike[str] | None = None,
) -> RankPlan:
    """Choose a rank for every module of an adapter from its spectra; `resize` takes the plan.

    Args:
        adapter: One adapter, as `open_adapter` takes it, or its spectra.
        rule: A rank, or a rule: energy:0.95, elbow, budget:x0.5, match:4, full, ...
        min_rank: Smallest rank; 0 lets modules be dropped.
        max_rank: Largest rank.
        round_to: Ranks become multiples of this, rounded up, where a module has that many.
        objective: What `budget` and `match` minimise: squared error, or that over the delta's
            ("relative") or the base weight's norm ("base-relative").
        base: Directory of the base model, for "base-relative".
        exact: Spread a budget by dynamic programming instead of water-filling.
        bottleneck: Statistics file: keep output energy on data instead of the sum of squares.
        fisher: The same, outputs weighted by their Fisher information.

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
    if isinstance(adapter, AdapterSpectra):
        if bottleneck or fisher or base:
            raise MethodError("statistics and a base need the adapter, not its spectra", "give it")
        opened, found = None, adapter
    else:
        opened = open_adapter(adapter)
        found = adapter_spectra(opened)
    require_finite(found)
    stats = bottleneck or fisher
    if bottleneck and fisher:
        raise MethodError("two statistics files", "give bottleneck or fisher, not both")
    if (objective == "base-relative") != (base is not None):
        raise MethodError("objective base-relative and base belong together", "give both or none")
    if opened is not None and stats is not None:
        moments = read_moments(Path(stats))
        found = weigh_spectra(opened, found, moments, fisher=fisher is not None)
    weights = None
    if objective == "relative":
        energies = {n: float(v.square().sum()) for n, v in found.by_module.items()}
        weights = {n: 1 / energy if energy > 0 else 1.0 for n, energy in energies.items()}
    elif opened is not None and base is not None:
        weights = base_weights(opened, open_checkpoint(Path(base)))
    return choose_from_spectra(
        found.by_module,
        found.costs,
        rule,
        before=found.ranks,
        min_rank=min_rank,
        max_rank=max_rank,
        round_to=round_to,
        weights=weights,
        exact=exact,
    )
