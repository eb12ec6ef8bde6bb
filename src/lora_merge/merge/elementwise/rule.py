"""What an elementwise merge does to each entry: sparsify, weigh, elect, combine. Options only.

Where PEFT, mergekit and the authors' code differ, the difference is a field of `Rule`:

| field      | authors                             | PEFT          | mergekit            |
| ---------- | ----------------------------------- | ------------- | ------------------- |
| scope      | TIES: all modules' entries together | each tensor   | each tensor         |
| elect_on   | unweighted                          | unweighted    | weighted            |
| zero_sign  | majority of the whole vector        | plus          | plus                |
| divide_by  | number of agreeing adapters         | their number  | sum of their weights|
| rescale    | 1 / keep probability                | 1 / density   | L1 norm matched     |
| trim       | DARE-TIES trims after dropping      | no trim       | no trim             |
"""

from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal

from lora_merge.errors import MethodError

Sparsifier = Literal["none", "magnitude", "random", "della", "outliers", "variance"]
Scope = Literal["tensor", "row", "global"]
Compat = Literal["authors", "peft", "mergekit"]


@dataclass(frozen=True)
class Rule:
    """An elementwise merge rule.

    Attributes:
        sparsify: "magnitude" keeps the largest entries; "random" drops entries at random (DARE);
            "della" drops with a probability that falls with an entry's rank in its row;
            "outliers" drops the `gamma` largest, then the smallest (Breadcrumbs); "variance" keeps
            the positions where the adapters differ most (SCE).
        density: Fraction of entries that is kept (expected fraction, for the random ones).
        gamma: Fraction of largest entries that "outliers" drops.
        epsilon: "della": keep probabilities run from density - epsilon to density + epsilon.
        trim: After "random", keep this fraction of largest entries.
        scope: Over which entries magnitudes are ranked: one module's matrix, each of its rows, or
            all modules of the adapter together.
        rescale: What makes up for dropped entries: nothing, division by the keep probability, or
            a factor that restores the matrix's L1 norm.
        elect: Sign of each entry by summed values ("total") or by a count of signs ("frequency").
        elect_on: Whether the vote is held on the adapters' entries or on weight times entry.
        zero_sign: Sign where the vote is exactly 0: plus, or the majority of all elected signs.
        divide_by: What the sum over (agreeing) adapters is divided by: nothing, their number, the
            sum of their weights, or of their weights' absolute values. Where an election is held,
            only adapters that agree count.
        energy_weights: Multiply each weight by the adapter's share of the squared norm (SCE).
        own: Rules of the adapters, by owner, that differ from this one in density, gamma, epsilon
            or trim; empty where they do not.
    """

    sparsify: Sparsifier = "none"
    density: float = 1.0
    gamma: float = 0.01
    epsilon: float = 0.07
    trim: float = 1.0
    scope: Scope = "tensor"
    rescale: Literal["none", "probability", "l1"] = "none"
    elect: Literal["none", "total", "frequency"] = "none"
    elect_on: Literal["unweighted", "weighted"] = "unweighted"
    zero_sign: Literal["majority", "plus"] = "majority"
    divide_by: Literal["none", "count", "weights", "abs-weights"] = "none"
    energy_weights: bool = False
    own: tuple["Rule", ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that have no meaning."""
        for name in ("density", "gamma", "epsilon", "trim"):
            value = getattr(self, name)
            if not (isfinite(value) and 0 <= value <= 1):
                raise MethodError(f"{name} is {value}, not between 0 and 1", "correct it")
        if self.sparsify in ("random", "della") and self.density == 0:
            raise MethodError(
                f"density 0 with {self.sparsify} sparsification keeps nothing", "raise it"
            )
        if self.sparsify == "della" and self.density < 1:
            low, high = self.density - self.epsilon, self.density + self.epsilon
            if low <= 0 or high > 1:
                raise MethodError(
                    f"density {self.density:g} with epsilon {self.epsilon:g} gives keep "
                    f"probabilities from {low:g} to {high:g}",
                    "choose epsilon below density and at most 1 - density",
                )
        if self.trim < 1 and self.sparsify != "random":
            raise MethodError(f"trim has no meaning after {self.sparsify!r}", "use density")
        if self.scope == "global" and self.sparsify == "variance":
            raise MethodError("variance across adapters has no global scope", "use scope tensor")

    def of(self, owner: int) -> "Rule":
        """The rule for one adapter."""
        return self.own[owner] if self.own else self

    @property
    def is_random(self) -> bool:
        """Whether the result depends on the seed."""
        drops = self.density < 1 or any(rule.density < 1 for rule in self.own)
        return self.sparsify in ("random", "della") and drops

    @property
    def needs_rows(self) -> bool:
        """Whether entries are ranked within their rows, which must then come whole."""
        return self.scope == "row" or self.sparsify == "della"

    @property
    def magnitude_density(self) -> float:
        """Fraction of entries that ranking by magnitude keeps; 1 where there is no such step."""
        if self.sparsify in ("magnitude", "outliers"):
            return self.density
        return self.trim if self.sparsify == "random" else 1.0

    @property
    def needs_thresholds(self) -> bool:
        """Whether magnitudes must be ranked over more than a row before anything is merged."""
        cuts = self.magnitude_density < 1 or any(rule.magnitude_density < 1 for rule in self.own)
        return cuts and self.scope != "row"

    @property
    def needs_statistics(self) -> bool:
        """Whether a pass over all entries must come before the merge."""
        variance = self.sparsify == "variance" and self.density < 1
        return self.needs_thresholds or self.rescale == "l1" or self.energy_weights or variance


_ELECTED = Rule(elect="total", divide_by="count")

# The authors' behaviour; densities are their recommended or example values.
_PRESETS: dict[str, Rule] = {
    "magnitude": Rule("magnitude", density=0.2),
    "ties": replace(_ELECTED, sparsify="magnitude", density=0.2, scope="global"),
    "dare": Rule("random", density=0.5, rescale="probability"),
    "dare-ties": replace(
        _ELECTED,
        sparsify="random",
        density=0.5,
        rescale="probability",
        trim=0.2,
        scope="global",
    ),
    "della": replace(_ELECTED, sparsify="della", density=0.7, epsilon=0.07, rescale="probability"),
    "breadcrumbs": Rule("outliers", density=0.9, gamma=0.01),
    "sce": Rule(
        "variance",
        density=1.0,
        elect="total",
        elect_on="unweighted",
        zero_sign="plus",
        divide_by="abs-weights",
        energy_weights=True,
    ),
}
_PEFT = {"scope": "tensor", "zero_sign": "plus", "trim": 1.0}
_MERGEKIT = {"scope": "tensor", "zero_sign": "plus", "elect_on": "weighted", "trim": 1.0}
_COMPAT: dict[tuple[str, str], dict[str, Any]] = {
    ("mergekit", "ties"): {"divide_by": "weights"},
    ("mergekit", "dare"): {"rescale": "l1"},
    ("mergekit", "dare-ties"): {"rescale": "l1", "divide_by": "none"},
    ("mergekit", "della"): {"rescale": "l1", "divide_by": "weights", "epsilon": 0.15},
    ("mergekit", "sce"): {"elect_on": "unweighted"},
}


def rule_names() -> tuple[str, ...]:
    """Names of the preset rules."""
    return tuple(_PRESETS)


def preset(name: str, *, compat: Compat = "authors", **changes: Any) -> Rule:
    """The rule of a published method.

    Args:
        name: One of `rule_names()`.
        compat: Whose code to agree with.
        changes: Fields of `Rule` to set on top (density, scope, ...).

    Raises:
        MethodError: If there is no such rule or a value is out of range.
    """
    if name not in _PRESETS:
        raise MethodError(
            f"there is no elementwise rule {name!r}", f"choose from: {', '.join(_PRESETS)}"
        )
    if compat not in ("authors", "peft", "mergekit"):
        raise MethodError(f"compat is {compat!r}", "choose from: authors, peft, mergekit")
    shared = {"authors": {}, "peft": _PEFT, "mergekit": _MERGEKIT}[compat]
    return replace(_PRESETS[name], **{**shared, **_COMPAT.get((compat, name), {}), **changes})


# Parameter → the sparsifiers that look at it.
_SEEN_BY: dict[str, tuple[Sparsifier, ...]] = {
    "gamma": ("outliers",),
    "epsilon": ("della",),
    "trim": ("random",),
    "scope": ("magnitude", "outliers", "random"),
}


def unseen(name: str) -> tuple[str, ...]:
    """Parameters that a published rule looks at in no case."""
    sparsify = _PRESETS[name].sparsify
    return tuple(field for field, by in _SEEN_BY.items() if sparsify not in by)


def without_effect(rule: Rule, field: str) -> str:
    """What a rule would need for a field to have a meaning; "" where it has one."""
    if field in ("elect_on", "zero_sign") and rule.elect == "none":
        return "an election of signs (elect)"
    if field == "scope" and rule.sparsify == "random" and rule.trim == 1 and rule.elect == "none":
        return "magnitudes to rank (trim below 1) or an election of signs"
    drops_at_random = rule.sparsify in ("random", "della")
    if field == "rescale" and rule.rescale == "probability" and not drops_at_random:
        return "entries that are dropped at random (dare, della)"
    return ""
