"""Short forms of numbers and names for narrow columns."""

import math
from collections.abc import Collection

from lora_merge.printing import span


def number(value: float | None) -> str:
    """Three significant digits in at most six characters; "-" where there is none."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        digits = 2 - math.floor(math.log10(abs(value)))
        return f"{value:.{min(max(digits, 0), 5)}f}"
    return f"{value:.0e}"


def dashed(values: Collection[int]) -> str:
    """A range of whole numbers in a narrow column: "4-16"."""
    return span(values, "-")


def shorten(text: str, width: int) -> str:
    """A module name in a width: leading components to three letters, then cut from the left."""
    parts = text.split(".")
    for index in range(len(parts) - 1):
        if len(".".join(parts)) <= width:
            break
        parts[index] = parts[index][:3]
    text = ".".join(parts)
    return text if len(text) <= width else "…" + text[1 - width :]
