"""Ranks for the modules of an adapter: the one way, for `choose_ranks` and for `resize`."""

from pathlib import Path

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.measured.spectra import AdapterSpectra, require_finite
from lora_merge.analysis.beside_base import base_weights
from lora_merge.analysis.weighted_spectra import read_moments, weigh_spectra
from lora_merge.errors import ArgumentError, MethodError
from lora_merge.files.checkpoint import open_checkpoint
from lora_merge.ranks.choose import RankPlan, choose_ranks
from lora_merge.ranks.options import RankOptions
from lora_merge.ranks.rule import RankRule, parse_rule


def read_rule(rule: RankRule | str | int) -> RankRule:
    """A rule from its text, or a rank."""
    return rule if isinstance(rule, RankRule) else parse_rule(str(rule))


def check_rule(rule: RankRule, options: RankOptions) -> None:
    """Refuse options that the rule would ignore.

    Raises:
        ArgumentError: If there are any.
    """
    if options.exact and rule.kind != "budget":
        raise ArgumentError(f"exact spreads a budget, and the rule is {rule}", "leave it out")
    if options.objective != "absolute" and rule.kind not in ("budget", "match"):
        raise ArgumentError(
            f"objective is of budget and match, and the rule is {rule}", "leave it out"
        )


def weighed(adapter: Adapter, spectra: AdapterSpectra, options: RankOptions) -> AdapterSpectra:
    """The spectra, weighted by the statistics that the options name."""
    require_finite(spectra)
    stats = options.bottleneck or options.fisher
    if stats is None:
        return spectra
    moments = read_moments(Path(stats))
    return weigh_spectra(adapter, spectra, moments, fisher=options.fisher is not None)


def chosen(
    adapter: Adapter | None, spectra: AdapterSpectra, rule: RankRule, options: RankOptions
) -> RankPlan:
    """Ranks by a rule from spectra, weighted already.

    Raises:
        ArgumentError: If the options do not fit the rule.
        MethodError: If the rule cannot be met.
    """
    check_rule(rule, options)
    weights = None
    if options.objective == "relative":
        energies = {n: float(v.square().sum()) for n, v in spectra.by_module.items()}
        weights = {n: 1 / energy if energy > 0 else 1.0 for n, energy in energies.items()}
    elif options.objective == "base-relative" and options.base is not None:
        if adapter is None:
            raise MethodError("a base needs the adapter, not its spectra", "give the adapter")
        weights = base_weights(adapter, open_checkpoint(Path(options.base)))
    return choose_ranks(
        spectra.by_module,
        spectra.costs,
        rule,
        before=spectra.ranks,
        min_rank=options.smallest,
        max_rank=options.max_rank,
        round_to=options.round_to,
        weights=weights,
        exact=options.exact,
    )
