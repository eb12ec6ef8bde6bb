"""Rank rules as text: what rules there are, what number each takes, and how they are written."""

import math
import re
from dataclasses import dataclass

from lora_merge.errors import MethodError
from lora_merge.ranks import module_rules


@dataclass(frozen=True)
class _Kind:
    """One rule: how it is called, what its value may be, and what it says of itself."""

    apply: module_rules.ModuleRule | None
    default: float | None
    low: float
    high: float
    about: str


_KINDS: dict[str, _Kind] = {
    "fixed": _Kind(module_rules.fixed, None, 0, math.inf, "the same rank for every module"),
    "energy": _Kind(module_rules.energy, 0.95, 0, 1, "share of sum s^2 that a module keeps"),
    "nuclear": _Kind(module_rules.nuclear, 0.95, 0, 1, "share of sum s that a module keeps"),
    "ratio": _Kind(module_rules.ratio, 20, 1, math.inf, "keeps values above the first / this"),
    "elbow": _Kind(module_rules.elbow, 0, 0, 0, "cut at the knee of each spectrum"),
    "erank": _Kind(
        module_rules.effective, 0, 0, 0, "the effective rank (Roy-Vetterli), rounded up"
    ),
    "soka": _Kind(module_rules.soka, 0.95, 0, 1, "the smaller of energy and elbow"),
    "full": _Kind(module_rules.full, 0, 0, 0, "every direction that is not numerically zero"),
    "welore": _Kind(
        module_rules.threshold, 0.05, 0, 1, "one cut on s / s_1, or the one for a budget"
    ),
    "budget": _Kind(None, None, 0, math.inf, "a parameter budget, spread where it saves most"),
    "match": _Kind(None, None, 1, math.inf, "fewest parameters, error as at this uniform rank"),
    "kohya-fro": _Kind(module_rules.kohya_fro, 0.9, 0, 1, "sd-scripts' sv_fro"),
    "kohya-cumulative": _Kind(
        module_rules.kohya_cumulative, 0.9, 0, 1, "sd-scripts' sv_cumulative"
    ),
    "kohya-ratio": _Kind(module_rules.kohya_ratio, 20, 1, math.inf, "sd-scripts' sv_ratio"),
    "lycoris-quantile": _Kind(module_rules.lycoris_quantile, 0.9, 0, 1, "LyCORIS' quantile"),
    "lycoris-ratio": _Kind(module_rules.lycoris_ratio, 0.05, 0, 1, "LyCORIS' ratio"),
    "lycoris-threshold": _Kind(
        module_rules.lycoris_threshold, 0.0, 0, math.inf, "LyCORIS' threshold"
    ),
    "peft": _Kind(module_rules.energy, 0.95, 0, 1, "PEFT's float rank (equal to energy)"),
}
_BUDGETED = ("budget", "welore")
_WHOLE = ("fixed", "match")
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
        if self.value is None or (self.kind in _KINDS and _KINDS[self.kind].high == 0):
            return self.kind
        whole = self.value == int(self.value)
        number = f"{self.value:.0f}" if whole else repr(self.value)  # all digits: a recipe has them
        if self.kind == "fixed":
            return number
        return f"{self.kind}:{'x' if self.unit == 'share' else ''}{number}"

    @property
    def of_module(self) -> module_rules.ModuleRule | None:
        """The rule of one module's spectrum; None where all modules are looked at together."""
        together = self.kind in ("budget", "match") or (self.kind == "welore" and self.unit)
        return None if together else _KINDS[self.kind].apply


def rule_names() -> dict[str, str]:
    """Every rule and what it does."""
    return {name: kind.about for name, kind in _KINDS.items()}


def parse_rule(text: str) -> RankRule:
    """Read a rule: `16`, `energy:0.95`, `elbow`, `budget:x0.5`, `budget:120000`, `full`, ...

    Raises:
        MethodError: If it names no rule, or its number is out of range.
    """
    if re.fullmatch(r"\d+", text):
        text = f"fixed:{text}"
    match = _TEXT.match(text)
    if match is None or match["kind"] not in _KINDS:
        raise MethodError(
            f"{text!r} is no rank rule",
            f"give a rank, or one of {', '.join(_KINDS)}, as in energy:0.95 or budget:x0.5",
        )
    kind, raw = match["kind"], match["value"]
    spec = _KINDS[kind]
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
    spec = _KINDS[kind]
    low, high = spec.low, spec.high
    if unit:
        low, high = (0, 1) if unit == "share" else (0, math.inf)
    whole = kind in _WHOLE or unit == "parameters"
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
