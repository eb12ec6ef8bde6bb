"""Which implementation runs: one table from measurements, one variable to overrule it.

The table of a device is written by `lora-merge tune`; for some cards one comes along, and what was
measured here goes before it. A case that nobody measured runs `eager`. `LORA_MERGE_KERNELS` names
one implementation for everything.
"""

import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch

from lora_merge.errors import LoraMergeWarning, MethodError
from lora_merge.files.documents import read_cache

Name = Literal["reference", "eager", "concat", "triton", "joined", "grouped"]
GateKind = Literal["given", "dense", "top-k"]
NAMES: tuple[Name, ...] = get_args(Name)
VARIABLE = "LORA_MERGE_KERNELS"

T = TypeVar("T")
_failed: dict[str, str] = {}


@dataclass(frozen=True)
class Case:
    """What decides which implementation is fastest.

    Attributes:
        device: As `device_name` says it.
        d_in: Input width.
        d_out: Output width, of all members together.
        units: R, of all members together.
        tokens: T.
        dtype: Of the factors.
        gate: Weights that are `given`, or made from scores: `dense`, or the `top-k` of them.
        experts: E, weights that a token has in one module.
        kept: k of `top-k`; 0 for the others.
    """

    device: str
    d_in: int
    d_out: int
    units: int
    tokens: int
    dtype: str
    gate: GateKind
    experts: int
    kept: int = 0

    @property
    def key(self) -> str:
        """Row of the table: sizes rounded up to powers of two, so that near cases share one."""
        sizes = (self.d_in, self.d_out, self.units, self.experts, self.tokens)
        d_in, d_out, units, experts, tokens = (1 << max(0, n - 1).bit_length() for n in sizes)
        gate = f"top-{self.kept}" if self.kept else self.gate
        return f"{d_in}x{d_out} R{units} E{experts} T{tokens} {self.dtype} {gate}"


def case_of(
    x: torch.Tensor,
    d_out: int,
    units: int,
    dtype: torch.dtype,
    gate: GateKind,
    experts: int,
    kept: int | None = None,
) -> Case:
    """The case of a call with tokens `x`, shape (..., d_in); the rest as in `Case`."""
    width = x.shape[-1]
    tokens = x.numel() // max(1, width)
    name, kept = str(dtype).removeprefix("torch."), kept or 0
    return Case(device_name(x.device), width, d_out, units, tokens, name, gate, experts, kept)


def choose(case: Case, able: Sequence[Name]) -> Name:
    """The implementation for a case, among those that can run it.

    Args:
        case: What is to be run.
        able: Implementations that can run it; the first is what runs unless a measurement or the
            user says otherwise.

    Raises:
        MethodError: If `LORA_MERGE_KERNELS` is none of the names.
    """
    return _choose(case, tuple(able), forced())


@lru_cache(maxsize=4096)
def _choose(case: Case, able: tuple[Name, ...], wanted: str) -> Name:
    if wanted == "auto":
        seconds = table(case.device).get(case.key, {})
        return min(
            (name for name in able if name in seconds), key=seconds.__getitem__, default=able[0]
        )
    return next((name for name in able if name == wanted), able[0])


def forced() -> str:
    """What the user asked for: a name, or auto.

    Raises:
        MethodError: If `LORA_MERGE_KERNELS` is something else.
    """
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted != "auto" and wanted not in NAMES:
        raise MethodError(f"{VARIABLE} is {wanted!r}", f"auto, {', '.join(NAMES)}")
    return wanted


def guarded(name: str, fast: Callable[[], T], plain: Callable[[], T]) -> T:
    """Run a kernel; if it fails, say so once, and run the plain way from then on.

    What is the input's fault, or a lack of memory, is not the kernel's and goes through.
    """
    if torch.compiler.is_compiling():
        return fast()
    if name in _failed:
        return plain()
    try:
        return fast()
    except (MethodError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        _failed[name] = f"{type(error).__name__}: {error}"
        text = f"the kernel {name} failed ({_failed[name]}); eager runs instead"
        warnings.warn(text, LoraMergeWarning, stacklevel=2)
        return plain()


def failed() -> dict[str, str]:
    """Kernels that failed and are replaced by eager, and why: their times would be eager's."""
    return dict(_failed)


# -- the table -----------------------------------------------------------------------------------


@cache
def device_name(device: torch.device) -> str:
    """Name of a device that measurements hold for, fit for a file's name."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"\W+", "-", torch.cuda.get_device_name(device)).strip("-").lower()


@dataclass(frozen=True)
class TunedRow:
    """Seconds of each implementation in one case."""

    seconds: dict[str, float]


@dataclass(frozen=True)
class TunedTable:
    """The file of a device's measurements."""

    versions: dict[str, str]
    rows: dict[str, TunedRow]


def table_path(device: str) -> Path:
    """Where a device's table is kept: one for each Triton, which decides what kernels become."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    triton = re.sub(r"[^\w.]+", "-", versions()["triton"])
    return Path(home) / "lora-merge" / "kernels" / f"{device}-triton-{triton}.json"


@cache
def versions() -> dict[str, str]:
    """What a measurement depends on beside the device."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"torch": str(torch.__version__)}
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = "none"
    return found


@cache
def table(device: str) -> dict[str, dict[str, float]]:
    """Key of a case → seconds of each implementation, as measured here, or on a card like it."""
    return {**_shipped(device), **_measured_here(device)}


def _measured_here(device: str) -> dict[str, dict[str, float]]:
    path = table_path(device)
    if not path.exists():
        return {}
    found = read_cache(TunedTable, path)
    if found is None or found.versions != versions():
        text = f"{path} is damaged or from other versions and is ignored; run `lora-merge tune`"
        warnings.warn(text, LoraMergeWarning, stacklevel=2)
        return {}
    return {key: row.seconds for key, row in found.rows.items()}


@dataclass(frozen=True)
class ShippedTable:
    """Measurements that come along, for cards whose names begin so (`shipped_table.py`)."""

    cards: list[str]
    rows: dict[str, TunedRow]


def _shipped(device: str) -> dict[str, dict[str, float]]:
    for path in sorted((Path(__file__).parent / "tables").glob("*.json")):
        found = read_cache(ShippedTable, path)
        if found is not None and device.startswith(tuple(found.cards)):
            return {key: row.seconds for key, row in found.rows.items()}
    return {}


def forget() -> None:
    """Read the table anew and give failed kernels another chance."""
    table.cache_clear()
    _choose.cache_clear()
    _failed.clear()
