"""Rank rules as text: what rules there are, what number each takes, and how they are written.

Plain data, from which the commands are made; `module_rules` has what they do.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from lora_merge.errors import MethodError


@dataclass(frozen=True)
class RuleKind:
    """One rule: what its value may be, what it says of itself, and how a command line spells it.

    Attributes:
        default: Its number if none is given; None where it must be given.
        low: Smallest number.
        high: Largest number; 0 of a rule without one.
        about: What it does.
        option: Its option's name, "" where it has none of its own.
        help: What the option says, where that is more than `about`.
        metavar: What the option calls its value.
        compat: Other tool → the rule that counts as it does.
    """

    default: float | None
    low: float
    high: float
    about: str
    option: str = ""
    help: str = ""
    metavar: str | None = None
    compat: Mapping[str, str] = field(default_factory=dict)


KINDS: dict[str, RuleKind] = {
    "fixed": RuleKind(
        None, 0, math.inf, "the same rank for every module", "rank", compat={"peft": "fixed"}
    ),
    "energy": RuleKind(
        0.95, 0, 1, "share of sum s^2 that a module keeps", "energy",
        compat={"kohya": "kohya-fro", "peft": "peft"},
    ),
    "nuclear": RuleKind(
        0.95, 0, 1, "share of sum s that a module keeps", "nuclear",
        compat={"kohya": "kohya-cumulative", "lycoris": "lycoris-quantile"},
    ),
    "ratio": RuleKind(
        20, 1, math.inf, "keeps values above the first / this", "ratio",
        compat={"kohya": "kohya-ratio", "lycoris": "lycoris-ratio"},
    ),
    "elbow": RuleKind(0, 0, 0, "cut at the knee of each spectrum", "elbow"),
    "erank": RuleKind(0, 0, 0, "the effective rank (Roy-Vetterli), rounded up", "erank"),
    "soka": RuleKind(0.95, 0, 1, "the smaller of energy and elbow", "soka"),
    "welore": RuleKind(
        0.05, 0, 1, "one cut on s / s_1, or the one for a budget", "welore",
        "one cut T on s / s_1 for all modules, or the one that leaves a share or N parameters",
        "T|xF|N",
    ),
    "budget": RuleKind(
        None, 0, math.inf, "a parameter budget, spread where it saves most", "budget",
        "N parameters, or a share (x0.5), where they save most", "N|xF",
    ),
    "match": RuleKind(
        None, 1, math.inf, "fewest parameters, error as at this uniform rank", "match"
    ),
    "full": RuleKind(0, 0, 0, "every direction that is not numerically zero: lossless", "full"),
    "kohya-fro": RuleKind(0.9, 0, 1, "sd-scripts' sv_fro"),
    "kohya-cumulative": RuleKind(0.9, 0, 1, "sd-scripts' sv_cumulative"),
    "kohya-ratio": RuleKind(20, 1, math.inf, "sd-scripts' sv_ratio"),
    "lycoris-quantile": RuleKind(0.9, 0, 1, "LyCORIS' quantile"),
    "lycoris-ratio": RuleKind(0.05, 0, 1, "LyCORIS' ratio"),
    "lycoris-threshold": RuleKind(0.0, 0, math.inf, "LyCORIS' threshold"),
    "peft": RuleKind(0.95, 0, 1, "PEFT's float rank (equal to energy)"),
}  # fmt: skip
_BUDGETED = ("budget", "welore")
WHOLE = ("fixed", "match")  # rules whose number is a rank
_TEXT = re.compile(r"^(?P<kind>[a-z-]+)(?::(?P<value>.+))?$")


@dataclass(frozen=True)
class RankRule:
    """How ranks are chosen.

    Attributes:
        kind: Name of the rule; `rule_names()` lists them.
        value: Its number, None where the rule takes none.
        unit: What a budget is counted in: "parameters", or "share" of what there is now.
    """

    kind: str
    value: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        if self.value is None or (self.kind in KINDS and KINDS[self.kind].high == 0):
            return self.kind
        whole = self.value == int(self.value)
        number = f"{self.value:.0f}" if whole else repr(self.value)  # all digits: a recipe has them
        if self.kind == "fixed":
            return number
        return f"{self.kind}:{'x' if self.unit == 'share' else ''}{number}"

    @property
    def is_global(self) -> bool:
        """Whether all modules are looked at together, instead of one after another."""
        return self.kind in ("budget", "match") or (self.kind == "welore" and bool(self.unit))


def rule_names() -> dict[str, str]:
    """Every rule and what it does."""
    return {name: kind.about for name, kind in KINDS.items()}


def parse_rule(text: str) -> RankRule:
    """Read a rule: `16`, `energy:0.95`, `elbow`, `budget:x0.5`, `budget:120000`, `full`, ...

    Raises:
        MethodError: If it names no rule, or its number is out of range.
    """
    if re.fullmatch(r"\d+", text):
        text = f"fixed:{text}"
    match = _TEXT.match(text)
    if match is None or match["kind"] not in KINDS:
        near = get_close_matches(text.partition(":")[0].lower(), KINDS, n=1)
        known = f"give a rank, or one of {', '.join(KINDS)}, as in energy:0.95 or budget:x0.5"
        raise MethodError(
            f"{text!r} is no rank rule", f"did you mean {near[0]!r}?" if near else known
        )
    kind, raw = match["kind"], match["value"]
    spec = KINDS[kind]
    if raw is None:
        if spec.default is None:
            raise MethodError(f"the rank rule {kind!r} needs a number", f"write {kind}:NUMBER")
        return RankRule(kind, spec.default if spec.high else None)
    unit = ""
    if kind in _BUDGETED:
        unit = "share" if raw.startswith("x") else "parameters"
        if kind == "welore" and unit == "parameters" and _number(raw, text) <= 1:
            unit = ""
    value = _number(raw.removeprefix("x") if unit == "share" else raw, text)
    _check_range(kind, value, unit, text)
    return RankRule(kind, value, unit)


def _number(text: str, rule: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise MethodError(f"{rule!r}: {text!r} is no number", "write it like energy:0.95")
    return value


def _check_range(kind: str, value: float, unit: str, text: str) -> None:
    spec = KINDS[kind]
    low, high = spec.low, spec.high
    if unit:
        low, high = (0, 1) if unit == "share" else (0, math.inf)
    whole = kind in WHOLE or unit == "parameters"
    if not low <= value <= high or (whole and value != int(value)) or high == 0:
        if unit == "parameters" and 0 < value < 1:
            raise MethodError(
                f"{text!r}: {value:g} is no number of parameters",
                f"a share is written with an x: x{value:g}",
            )
        limits = "takes no number" if high == 0 else f"lies between {low:g} and {high:g}"
        raise MethodError(
            f"{text!r}: the number of {kind!r} {limits}{' and is whole' if whole else ''}",
            f"{kind}: {spec.about}",
        )
