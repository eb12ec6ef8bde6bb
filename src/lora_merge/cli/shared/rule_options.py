"""Options that name a rank rule, and the one rule they mean together."""

from typing import Any

import click

from lora_merge.cli.shared.options import Choice, together
from lora_merge.ranks.rule import KINDS, WHOLE, RuleKind

# The rules that have an option, under its name.
_OPTIONS = {kind.option: (name, kind) for name, kind in KINDS.items() if kind.option}
_DEFAULT = ("energy", 0.95)


def _option(name: str, kind: RuleKind) -> Any:
    text = kind.help or kind.about
    text = f"{text[:1].upper()}{text[1:]}."
    if name == _DEFAULT[0]:
        text += f"  [default: {_DEFAULT[1]}]"
    if kind.high == 0:
        return click.option(f"--{name}", is_flag=True, help=text)
    if kind.metavar:
        return click.option(f"--{name}", metavar=kind.metavar, help=text)
    if kind.high == 1:
        return click.option(f"--{name}", type=click.FloatRange(0, 1, min_open=True), help=text)
    if _OPTIONS[name][0] in WHOLE:
        return click.option(f"--{name}", type=click.IntRange(min=1), help=text)
    return click.option(f"--{name}", type=click.FloatRange(min=kind.low), help=text)


rule_options = together(
    *(_option(name, kind) for name, (_, kind) in _OPTIONS.items()),
    click.option(
        "--compat",
        type=Choice(list(dict.fromkeys(c for kind in KINDS.values() for c in kind.compat))),
        help="Count as sd-scripts (--energy is its sv_fro), PEFT or LyCORIS do.",
    ),
)


def take_rule(arguments: dict[str, Any], *more: str) -> str:
    """Take the rule's options out of `arguments`; returns its text for `parse_rule`.

    Args:
        arguments: All options of the command, by name.
        more: Flags that are rules of this command alone, by name.

    Raises:
        click.UsageError: If several rules are given, or the compatibility mode has no such rule.
    """
    compat = arguments.pop("compat")
    taken = {name: arguments.pop(name) for name in (*_OPTIONS, *more)}
    given = {n.replace("_", "-"): v for n, v in taken.items() if v not in (None, False)}
    if len(given) > 1:
        raise click.UsageError(f"give one rank rule, not {' and '.join(f'--{n}' for n in given)}")
    option, value = next(iter(given.items()), _DEFAULT)
    rule = _OPTIONS[option][0] if option in _OPTIONS else option
    if compat is not None:
        same = {name: kind.compat[compat] for name, kind in KINDS.items() if compat in kind.compat}
        if rule not in same:
            known = ", ".join(f"--{KINDS[name].option}" for name in same)
            raise click.UsageError(f"--compat {compat} knows {known}")
        rule = same[rule]
        if rule == "lycoris-ratio":
            value = 1 / value  # LyCORIS gives the share of the first value, not its reciprocal
    return rule if value is True else f"{rule}:{value}"
