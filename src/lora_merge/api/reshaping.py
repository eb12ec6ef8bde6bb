"""One adapter in, one out: resize, convert, extract it from two models, fuse it into its base.

Each as a pair: `plan_...` decides and shows, from headers as far as that can be; the function of
the same name plans and runs.
"""

from pathlib import Path

from lora_merge.adapters.access.coerce import open_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.in_memory import MadeAdapter
from lora_merge.adapters.measured.spectra import AdapterSpectra, adapter_spectra
from lora_merge.api.arguments import reshaping as takes_of
from lora_merge.api.inputs import check_out, run
from lora_merge.api.ranking import check_rule, chosen, read_rule, weighed
from lora_merge.arguments import takes
from lora_merge.errors import ArgumentError, MethodError
from lora_merge.files.checkpoint import open_checkpoint
from lora_merge.files.header import code_of
from lora_merge.planning import counted
from lora_merge.ranks.choose import RankPlan
from lora_merge.reshape import extract as extracting
from lora_merge.reshape import fuse as fusing
from lora_merge.reshape import resize as resizing
from lora_merge.reshape.convert import ConversionPlan, ConvertReport, plan_conversion
from lora_merge.reshape.stored_units import PRUNE_GATES, nested_plan, prune_plan

_WHOLE = 1 << 30  # every rank: `energy` then says where to cut


@takes(takes_of.PlanResize)
def plan_resize(given: takes_of.PlanResize) -> resizing.ResizePlan:
    """Decide the ranks of `resize`, and what would be written; reads the adapter once.

    Returns:
        The plan: `ranks` has every module's rank and what that keeps, `run` makes it.

    Raises:
        MethodError: If the rule cannot be met.

    Examples:
        >>> import lora_merge
        >>> plan = lora_merge.plan_resize("examples/adapters/upper", "budget:x0.5")
        >>> plan.ranks.parameters <= plan.ranks.parameters_before / 2
        True
    """
    return _plan_resize(given)


def _plan_resize(given: takes_of.PlanResize) -> resizing.ResizePlan:
    _check_resize(given)
    adapter = open_adapter(given.adapter, **given.opening)
    step = counted(given.progress, "measuring", len(adapter.modules))
    spectra = weighed(adapter, adapter_spectra(adapter, keep_cores=True, on_module=step), given)
    ranks = _ranks(adapter, spectra, given)
    return resizing.plan_resize(
        adapter, spectra, ranks, dtype=code_of(given.dtype), layout=given.layout
    )


def _check_resize(given: takes_of.PlanResize) -> None:
    """Refuse arguments that would be ignored beside others, before anything is read."""
    prune = given.ranks == PRUNE_GATES
    if given.nested and (prune or isinstance(given.ranks, RankPlan)):
        raise ArgumentError("nested needs a rank", "give the rank, or leave nested out")
    if given.nested and read_rule(given.ranks).kind != "fixed":  # type: ignore[arg-type]
        raise ArgumentError("nested needs a rank, not a rule", "give the rank")
    if (given.nested or prune) and (given.bottleneck or given.fisher):
        what = "nested" if given.nested else PRUNE_GATES
        raise ArgumentError(f"{what} keeps units as they are: it takes no statistics", "leave out")
    if prune and (given.max_rank or given.min_rank > 1 or given.round_to > 1):
        raise ArgumentError(
            f"{PRUNE_GATES} keeps every unit that adds something: it takes no min_rank, max_rank "
            "or round_to",
            "resize its result",
        )
    if not prune and not isinstance(given.ranks, RankPlan):
        check_rule(read_rule(given.ranks), given)


def _ranks(adapter: Adapter, spectra: AdapterSpectra, given: takes_of.PlanResize) -> RankPlan:
    if isinstance(given.ranks, RankPlan):
        if set(given.ranks.ranks) != set(adapter.modules):
            raise MethodError("the plan is that of another adapter", "choose ranks for this one")
        return given.ranks
    if given.ranks == PRUNE_GATES:
        return prune_plan(adapter, spectra, min_rank=given.smallest)
    plan = chosen(adapter, spectra, read_rule(given.ranks), given)
    return nested_plan(adapter, spectra, plan.ranks) if given.nested else plan


@takes(takes_of.Resize)
def resize(given: takes_of.Resize) -> MadeAdapter[resizing.ResizeReport]:
    """Give an adapter new ranks: the best approximation of every delta at its rank.

    Returns:
        The adapter, with the `report` of what truncation and rounding cost.

    Raises:
        MethodError: If the rule cannot be met.
        OutputError: If `out` cannot be written; nothing is left behind.

    Examples:
        >>> import lora_merge
        >>> small = lora_merge.resize("examples/adapters/upper", 4)
        >>> small.ranks()
        Counter({4: 14})
        >>> 0 < small.report.truncation < 1
        True
    """
    _check_resize(given)
    stats = (given.base, given.bottleneck, given.fisher)
    check_out(given.out, given.adapter, *stats, force=given.force)
    return run(_plan_resize(given), given, given.out)


@takes(takes_of.PlanExtract)
def plan_extract(given: takes_of.PlanExtract) -> extracting.ExtractPlan:
    """Decide from headers which weights `extract` will compare.

    Returns:
        The plan; which weights differ, and by how much, shows when it runs.

    Raises:
        MethodError: If none can be extracted.

    Examples:
        >>> import lora_merge
        >>> plan = lora_merge.plan_extract("examples/base", "examples/base", 8)
        >>> len(plan.names)
        14
    """
    return _plan_extract(given)


def _plan_extract(given: takes_of.PlanExtract) -> extracting.ExtractPlan:
    base, tuned = open_checkpoint(Path(given.base)), open_checkpoint(Path(given.tuned))
    return extracting.plan_extract(base, tuned, read_rule(given.rule), given)


@takes(takes_of.Extract)
def extract(given: takes_of.Extract) -> MadeAdapter[extracting.ExtractReport]:
    """A LoRA of the differences between a model and its fine-tuned version.

    Returns:
        The adapter, with the `report` of what was extracted and what was not.

    Raises:
        MethodError: If no weight has changed, or none can be extracted.
        OutputError: If the directory cannot be written.

    Examples:
        >>> import lora_merge
        >>> report = lora_merge.fuse("examples/adapters/upper", "examples/base", "tuned")
        >>> made = lora_merge.extract("examples/base", "tuned", 8)
        >>> max(made.ranks())
        8
    """
    check_out(given.out, given.base, given.tuned, force=given.force)
    return run(_plan_extract(given), given, given.out)


@takes(takes_of.PlanFuse)
def plan_fuse(given: takes_of.PlanFuse) -> fusing.FusePlan:
    """Find which tensors of the base `fuse` will change, from headers alone.

    Raises:
        AdapterError: If the adapter does not fit the base.

    Examples:
        >>> import lora_merge
        >>> plan = lora_merge.plan_fuse("examples/adapters/upper", "examples/base")
        >>> len(plan.rows())
        14
    """
    return _plan_fuse(given)


def _plan_fuse(given: takes_of.PlanFuse) -> fusing.FusePlan:
    adapter = open_adapter(given.adapter, base=given.base, **given.opening)
    return fusing.plan_fuse(adapter, Path(given.base), weight=given.weight)


@takes(takes_of.Fuse)
def fuse(given: takes_of.Fuse) -> fusing.FuseReport:
    """Write the base model with the adapter in it, shard by shard, in the base's dtype.

    Raises:
        AdapterError: If the adapter does not fit the base; nothing is written.
        OutputError: If the directory cannot be written; nothing is left behind.

    Examples:
        >>> import lora_merge
        >>> lora_merge.fuse("examples/adapters/upper", "examples/base", "fused").modules
        14
    """
    check_out(given.out, given.adapter, given.base, force=given.force)
    return run(_plan_fuse(given), given, given.out)


@takes(takes_of.PlanConvert)
def plan_convert(given: takes_of.PlanConvert) -> ConversionPlan:
    """Decide names, ranks and headers of a conversion, from headers alone.

    Raises:
        AdapterError: If a form needs `rank`, `energy` or `base`, or no rule leads to the format.

    Examples:
        >>> import lora_merge
        >>> plan = lora_merge.plan_convert("examples/adapters/upper", to="mlx")
        >>> plan.report().target, plan.report().out
        ('mlx', None)
    """
    return _plan_convert(given)


def _plan_convert(given: takes_of.PlanConvert) -> ConversionPlan:
    rank = given.rank if given.energy is None else _WHOLE
    adapter = open_adapter(given.adapter, rank=rank, **given.opening)
    base = None if given.base is None else open_checkpoint(Path(given.base))
    return plan_conversion(adapter, given, base=base)


@takes(takes_of.Convert)
def convert(given: takes_of.Convert) -> MadeAdapter[ConvertReport]:
    """An adapter in another format: exactly where its form is low-rank.

    Returns:
        The adapter, with the `report` of how exact each module's form is, and what a cut lost.

    Raises:
        AdapterError: If a form needs `rank`, `energy` or `base`.
        OutputError: If `out` cannot be written; nothing is left behind.

    Examples:
        >>> import lora_merge
        >>> lora_merge.convert("examples/adapters/upper", "plain", to="peft").ranks()
        Counter({8: 14})
    """
    check_out(given.out, given.adapter, given.base, force=given.force)
    return run(_plan_convert(given), given, given.out)
