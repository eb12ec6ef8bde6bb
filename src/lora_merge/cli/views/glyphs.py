"""Numbers as characters: sparklines, bars and digits, readable without colour."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_ASCII_LEVELS = "_.:-=+*#"
# Ten steps of cividis: even in lightness, the same to colour-blind eyes.
RAMP = (
    "#00224e",
    "#123570",
    "#3b496c",
    "#575d6d",
    "#707173",
    "#8a8678",
    "#a59c74",
    "#c3b369",
    "#e1cc55",
    "#fee838",
)


def log_profile(values: Tensor, width: int) -> list[float]:
    """log10(s_i / s_1) at `width` positions (all of them if fewer); -inf where s_i is 0."""
    if not values.numel() or not float(values[0]) > 0:
        return []
    ratios = (values / values[0]).log10().tolist()
    if len(ratios) <= width:
        return ratios
    last = len(ratios) - 1
    return [ratios[round(i * last / (width - 1))] for i in range(width)]


def median_profile(spectra: Sequence[Tensor], width: int) -> list[float]:
    """Median log profile of several spectra; a spectrum that has ended counts as 0 there."""
    alive = [v for v in spectra if v.numel() and float(v[0]) > 0]
    if not alive:
        return []
    size = max(v.numel() for v in alive)
    table = torch.zeros(len(alive), size, dtype=torch.float64)
    for row, values in zip(table, alive, strict=True):
        row[: values.numel()] = values / values[0]
    return log_profile(table.median(dim=0).values, width)


def sparkline(profile: Sequence[float], floor: float, *, ascii_only: bool = False) -> str:
    """A log profile as blocks between `floor` (the lowest block) and 0 (the highest)."""
    levels = _ASCII_LEVELS if ascii_only else _LEVELS
    top = len(levels) - 1
    return "".join(
        " "
        if value == -math.inf
        else levels[round(top * min(max(1 - value / floor, 0.0), 1.0)) if floor < 0 else top]
        for value in profile
    )


def share_line(shares: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """Numbers from 0 to 1 as blocks, at most `width` of them, evenly picked."""
    levels = _ASCII_LEVELS if ascii_only else _LEVELS
    last = len(shares) - 1
    if last >= width:
        shares = [shares[round(i * last / (width - 1))] for i in range(width)]
    return "".join(levels[round((len(levels) - 1) * share)] for share in shares)


def common_floor(profiles: Sequence[Sequence[float]]) -> float:
    """A lower limit for all profiles, in decades: the lowest value, by halves, at most -4."""
    lowest = min((v for p in profiles for v in p if v > -math.inf), default=0.0)
    return max(-4.0, min(-0.5, math.floor(2 * lowest) / 2))


def bar(share: float, width: int, *, ascii_only: bool = False) -> str:
    """A horizontal bar of a share of `width` characters."""
    share = min(max(share, 0.0), 1.0)
    if ascii_only:
        return "#" * round(share * width)
    eighths = round(share * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def level(value: float, low: float, high: float, *, log: bool) -> int:
    """A value as 0..9 between two limits."""
    if log:
        value, low, high = (math.log(max(x, 1e-300)) for x in (value, low, high))
    return round(9 * min(max((value - low) / (high - low), 0.0), 1.0)) if high > low else 9
