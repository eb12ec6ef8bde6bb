"""Which rank each module's result gets, as far as headers tell."""

from collections import Counter
from collections.abc import Mapping

from lora_merge.adapters.alignment import Alignment
from lora_merge.errors import MethodError
from lora_merge.merge.methods.method import Method
from lora_merge.merge.recipe.recipe import Space
from lora_merge.ranks.rule import RankRule, parse_rule


def plan_ranks(
    alignment: Alignment, method: Method, rank: int | str | None, space: Space
) -> tuple[RankRule, dict[str, int], list[str]]:
    """The rank rule, each module's rank, and what to say of it.

    Args:
        alignment: The adapters.
        method: Its own rank counts where none is given.
        rank: A number, or a rule.
        space: Where the method works; decides how large a rank can be.

    Returns:
        The rule; the rank of each module's result, which is the largest possible one if the rule
        has to see the results first; notes.

    Raises:
        MethodError: If the rank is no rule, too large, or needs results that the method does not
            give.
    """
    units = {m.name: m.num_units for m in alignment.modules}
    limits = dict(units)
    if space in method.full_rank_in:
        limits = {m.name: min(m.first.d_out, m.first.d_in) for m in alignment.modules}
    text = str(method.rank if rank is None else rank)
    if text == "units":
        return RankRule("units"), units, []
    if text == "largest":
        largest = max(s.rank for m in alignment.modules for s in m.specs.values())
        text = str(min(largest, max(limits.values())))
    rule = parse_rule(text)
    if rule.kind == "full":
        return rule, limits, []
    if rule.kind != "fixed":
        if method.makes_rank and not method.gauge_free:
            raise MethodError(
                f"method {method.name} needs a rank, not the rule {text!r}", "give a number"
            )
        return rule, limits, _measuring_notes(method, limits, units, text)
    return rule, *_fixed_ranks(int(rule.value or 0), limits)


def _measuring_notes(
    method: Method, limits: Mapping[str, int], units: Mapping[str, int], text: str
) -> list[str]:
    """Where results have full rank, a rule needs whole spectra, and rarely gives small ranks."""
    largest = max(limits.values())
    if largest <= max(units.values()):
        return []
    return [
        f"{method.name} makes deltas of full rank (up to {largest}): {text} needs their whole "
        "spectra, which takes long, and may keep most of them; --space core stays within "
        f"{max(units.values())} units"
    ]


def _fixed_ranks(wanted: int, limits: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
    largest = max(limits.values())
    if not 1 <= wanted <= largest:
        raise MethodError(
            f"rank {wanted} is not possible: the largest module has {largest} units",
            f"the largest rank for these adapters is {largest}",
        )
    ranks = {name: min(wanted, size) for name, size in limits.items()}
    few = Counter(size for size in limits.values() if size < wanted)
    return ranks, [
        f"{count} modules have only {size} units and keep them all" for size, count in few.items()
    ]
