"""Looking at adapters: what they are, their spectra, how they relate, what ranks to keep."""

from pathlib import Path

from lora_merge.adapters.access.coerce import open_adapter, open_adapters
from lora_merge.adapters.measured.spectra import AdapterSpectra, adapter_spectra, require_finite
from lora_merge.analysis import compare as comparing
from lora_merge.analysis.beside_base import BaseReport, default_cache, relate_to_base
from lora_merge.analysis.families import Algorithm, cluster_adapters
from lora_merge.analysis.info import AdapterInfo, describe
from lora_merge.analysis.neighbours import nearest
from lora_merge.analysis.pairs.plan import ComparisonPlan, plan_comparison
from lora_merge.analysis.verdicts import Judgement, judgement
from lora_merge.api.arguments import looking as takes_of
from lora_merge.api.arguments.reshaping import ChooseRanks
from lora_merge.api.ranking import check_rule, chosen, read_rule, weighed
from lora_merge.arguments import checked, takes
from lora_merge.errors import MethodError
from lora_merge.files.checkpoint import open_checkpoint
from lora_merge.planning import counted
from lora_merge.ranks.choose import RankPlan


@takes(takes_of.Info)
def info(given: takes_of.Info) -> AdapterInfo:
    """Read an adapter through and say what it is.

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
    adapter = open_adapter(given.adapter, **given.opening)
    return describe(adapter, on_module=counted(given.progress, "reading", len(adapter.modules)))


@takes(takes_of.Spectra)
def spectra(given: takes_of.Spectra) -> AdapterSpectra:
    """Exact singular values of every module's delta, scaling included, from the factors.

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
    adapter = open_adapter(given.adapter, **given.opening)
    return adapter_spectra(
        adapter,
        modules=given.modules,
        keep_cores=given.keep_cores,
        jobs=given.jobs,
        on_module=counted(given.progress, "reading", len(adapter.modules)),
    )


@takes(takes_of.BesideBase)
def spectra_beside_base(given: takes_of.BesideBase) -> BaseReport:
    """An adapter's deltas beside the weights they change: size, amplification, intruders.

    Raises:
        SourceError: If the base is no safetensors checkpoint.
        AdapterError: If a weight does not fit its module.

    Examples:
        >>> import lora_merge
        >>> report = lora_merge.spectra_beside_base("examples/adapters/upper", "examples/base")
        >>> len(report.relations)
        14
    """
    adapter = open_adapter(given.adapter, **given.opening)
    found = given.spectra or adapter_spectra(
        adapter, modules=given.modules, keep_cores=True, jobs=given.jobs
    )
    return relate_to_base(
        adapter,
        found,
        open_checkpoint(Path(given.base)),
        intruders=given.intruders,
        cache=default_cache(),
        jobs=given.jobs,
        on_module=counted(given.progress, "reading the base", len(found.finite)),
    )


@takes(takes_of.Compare)
def compare(given: takes_of.Compare) -> comparing.Comparison:
    """Compare all pairs of adapters on their deltas, without forming them.

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
    opened = open_adapters(given.adapters, **given.opening)
    names = {name for adapter in opened for name in adapter.modules}
    return comparing.compare(
        opened,
        modules=given.modules,
        angles=given.angles,
        per_module=given.per_module,
        on_matrices=given.on_matrices,
        accept_base_models=given.accept_base_models,
        seed=given.seed,
        jobs=given.jobs,
        on_module=counted(given.progress, "comparing", len(names)),
    )


@takes(takes_of.Compare)
def plan_compare(given: takes_of.Compare) -> ComparisonPlan:
    """What `compare` would take, from the adapters' headers: pairs, bytes to read, memory.

    Returns:
        The numbers; `peak_bytes` is about the process's peak.

    Raises:
        MethodError: If there are fewer than two adapters, or the patterns match no module.
        AlignmentError: If they do not fit together.

    Examples:
        >>> import lora_merge
        >>> plan = lora_merge.plan_compare("examples/adapters/*")
        >>> plan.adapters, plan.modules
        (3, 14)
    """
    return plan_comparison(
        open_adapters(given.adapters, **given.opening),
        modules=given.modules,
        angles=given.angles,
        per_module=given.per_module,
        accept_base_models=given.accept_base_models,
        jobs=given.jobs,
    )


@takes(takes_of.Neighbours)
def neighbours(given: takes_of.Neighbours) -> nearest.Neighbours:
    """Each adapter's nearest by the cosine of the deltas, families and near-duplicates.

    For pools that are too large for `compare`: memory grows with the number of adapters and not
    with that of pairs. Sketches choose candidates, whose cosines are then measured.

    Returns:
        The neighbours, what may have been missed, families, near-duplicates.

    Raises:
        MethodError: If there are not so many adapters, or the patterns match no module.
        AlignmentError: If they do not fit together.

    Examples:
        >>> import lora_merge
        >>> near = lora_merge.neighbours("examples/adapters/*", count=1)
        >>> [len(one) for one in near.neighbours]
        [1, 1, 1]
    """
    opened = open_adapters(given.adapters, **given.opening)
    names = {name for adapter in opened for name in adapter.modules}
    return nearest.neighbours_of(
        opened,
        given.count,
        modules=given.modules,
        accept_base_models=given.accept_base_models,
        jobs=given.jobs,
        on_module=counted(given.progress, "comparing", 2 * len(names)),
    )


@takes(takes_of.Neighbours)
def plan_neighbours(given: takes_of.Neighbours) -> ComparisonPlan:
    """What `neighbours` would take, from the adapters' headers.

    Returns:
        The numbers; `peak_bytes` is about the process's peak.

    Raises:
        MethodError: If there are not so many adapters, or the patterns match no module.
        AlignmentError: If they do not fit together.

    Examples:
        >>> import lora_merge
        >>> lora_merge.plan_neighbours("examples/adapters/*", count=1).pairs
        3
    """
    return nearest.plan_neighbours(
        open_adapters(given.adapters, **given.opening),
        given.count,
        modules=given.modules,
        accept_base_models=given.accept_base_models,
        jobs=given.jobs,
    )


@checked()
def judge(comparison: comparing.Comparison) -> Judgement:
    """What a comparison means for merging: what can be averaged, what conflicts, what to do.

    Args:
        comparison: From `compare`.

    Returns:
        One verdict per pair, the most alarming first; one on all together, as `whole`; and the
        tree of who is near whom.

    Examples:
        >>> import lora_merge
        >>> verdict = lora_merge.judge(lora_merge.compare("examples/adapters/*"))
        >>> verdict.whole.action, [pair.kind for pair in verdict]
        ('merge', ['independent', 'independent', 'independent'])
    """
    return judgement(comparison)


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
