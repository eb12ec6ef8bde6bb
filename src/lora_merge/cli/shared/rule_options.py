"""Options that name a rank rule, and the one rule they mean together."""

from typing import Any

import click

from lora_merge.cli.shared.options import together

_SHARE = click.FloatRange(0, 1, min_open=True)

rule_options = together(
    click.option("--rank", type=click.IntRange(min=1), help="The same rank everywhere."),
    click.option("--energy", type=_SHARE, help="Share of sum s^2 per module.  [default: 0.95]"),
    click.option("--nuclear", type=_SHARE, help="Share of sum s per module."),
    click.option("--ratio", type=click.FloatRange(min=1), help="Keep values above the first / X."),
    click.option("--elbow", is_flag=True, help="Cut each spectrum at its knee."),
    click.option("--erank", is_flag=True, help="Effective rank (Roy-Vetterli), rounded up."),
    click.option("--soka", type=_SHARE, help="The smaller of energy and elbow."),
    click.option(
        "--welore",
        metavar="T|xF|N",
        help="One cut T on s / s_1 for all modules, or the one that leaves a share or N parameters",
    ),
    click.option(
        "--budget", metavar="N|xF", help="N parameters, or a share (x0.5), where they save most."
    ),
    click.option("--match", type=click.IntRange(min=1), help="Fewest parameters, error as rank R."),
    click.option("--full", is_flag=True, help="Drop only what is numerically zero: lossless."),
    click.option(
        "--compat",
        type=click.Choice(["kohya", "peft", "lycoris"]),
        help="Count as sd-scripts (--energy is its sv_fro), PEFT or LyCORIS do.",
    ),
)
_NAMES = (
    *("rank", "energy", "nuclear", "ratio", "elbow", "erank"),
    *("soka", "welore", "budget", "match", "full"),
)
_COMPAT = {
    "kohya": {"energy": "kohya-fro", "nuclear": "kohya-cumulative", "ratio": "kohya-ratio"},
    "lycoris": {"nuclear": "lycoris-quantile", "ratio": "lycoris-ratio"},
    "peft": {"energy": "peft", "rank": "fixed"},
}


def take_rule(arguments: dict[str, Any], *more: str) -> str:
    """Take the rule's options out of `arguments`; returns its text for `parse_rule`.

    Args:
        arguments: All options of the command, by name.
        more: Flags that are rules of this command alone, by name.

    Raises:
        click.UsageError: If several rules are given, or the compatibility mode has no such rule.
    """
    compat = arguments.pop("compat")
    taken = {name: arguments.pop(name) for name in (*_NAMES, *more)}
    given = {n.replace("_", "-"): v for n, v in taken.items() if v not in (None, False)}
    if len(given) > 1:
        raise click.UsageError(f"give one rank rule, not {' and '.join(f'--{n}' for n in given)}")
    name, value = next(iter(given.items()), ("energy", 0.95))
    if compat is None:
        kind = {"rank": "fixed"}.get(name, name)
        return kind if value is True else f"{kind}:{value}"
    if name not in _COMPAT[compat]:
        known = ", ".join(f"--{n}" for n in _COMPAT[compat])
        raise click.UsageError(f"--compat {compat} knows {known}")
    if compat == "lycoris" and name == "ratio":
        value = 1 / value  # LyCORIS gives the share of the first value, not its reciprocal
    return f"{_COMPAT[compat][name]}:{value}"
