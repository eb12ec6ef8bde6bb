"""Names from files on a terminal: shown, never obeyed."""

import re

# Control characters but tab and newline, and the marks that turn the direction of writing.
_OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def for_terminal(text: str) -> str:
    r"""A text whose control characters stand as `\x1b`: it moves and colours nothing."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)
