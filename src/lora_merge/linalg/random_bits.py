"""Random bits that are a function of where they are used, not of when they are drawn.

Bit pattern = hash(seed, module, adapter, row, column). A mask is therefore the same for any block
size, order of blocks, device and number of threads, and an adapter keeps its mask whatever it is
merged with. (The idea of counter-based generators: Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011.)
"""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ROW_SALT = 0x243F6A8885A308D3  # digits of pi: nothing up the sleeve
_COLUMN_SALT = 0x13198A2E03707344
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)


def mask_key(seed: int, module: str, adapter: str) -> int:
    """The 64-bit key of one adapter's random numbers in one module.

    Args:
        seed: The merge's seed.
        module: Name of the module (with the expert's index, where there are several).
        adapter: What identifies the adapter whatever it is merged with (a hash or a name).
    """
    text = f"{seed}\0{module}\0{adapter}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def random_bits(
    key: int,
    row: int,
    shape: tuple[int, int],
    *,
    column: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform 32-bit patterns for a part of a matrix, as int32.

    Row and column are hashed apart with 64-bit mixes (SplitMix64), which is cheap because there are
    few of them, joined by exclusive or, and mixed again entry by entry with two rounds of
    "lowbias32" (multiply, xor-shift), less its last shift, which leaves the high bits alone.

    Args:
        key: From `mask_key`.
        row: Index of the part's first row in the whole matrix.
        shape: (rows, columns).
        column: Index of its first column.
        device: Where to compute; the bits do not depend on it.

    Returns:
        int32, shape (rows, columns), uniform over all of int32. Use the high bits (compare with a
        threshold); the low ones are weaker.
    """
    rows, columns = shape
    row_hash = _hash64(row, rows, key ^ _ROW_SALT, device)
    column_hash = _hash64(column, columns, key ^ _COLUMN_SALT, device)
    bits = torch.bitwise_xor(row_hash[:, None], column_hash[None, :])
    if bits.device.type == "cpu":
        _mix_numpy(bits.numpy().view(np.uint32))
    else:
        _mix(bits)
    return bits


def keep_threshold(probability: float | Tensor) -> Tensor:
    """The limit below which `random_bits` lie with this probability, to 2^-32; int32."""
    levels = torch.as_tensor(probability, dtype=torch.float64) * 2**32
    return (levels.round().clamp(max=2**32 - 1) - 2**31).to(torch.int32)


def _hash64(start: int, count: int, key: int, device: torch.device | str) -> Tensor:
    """High 32 bits of SplitMix64 at counters start, start + 1, ..., as int32, shape (count,)."""
    x = torch.arange(start, start + count, dtype=torch.int64, device=device)
    x = x * _signed64(_GOLDEN) + _signed64(key & _MASK64)
    x = (x ^ _shift64(x, 30)) * _signed64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift64(x, 27)) * _signed64(0x94D049BB133111EB)
    x = x ^ _shift64(x, 31)
    return (x >> 32).to(torch.int32)


def _mix(bits: Tensor) -> None:
    """Two rounds of lowbias32 in place on int32, whose shifts are arithmetic."""
    bits.bitwise_xor_(bits.bitwise_right_shift(16).bitwise_and_((1 << 16) - 1))
    bits.mul_(_MULTIPLIERS[0])
    bits.bitwise_xor_(bits.bitwise_right_shift(15).bitwise_and_((1 << 17) - 1))
    bits.mul_(_signed32(_MULTIPLIERS[1]))


def _mix_numpy(bits: np.ndarray[Any, np.dtype[np.uint32]]) -> None:
    """The same in numpy, which has unsigned integers and is three times faster on a CPU."""
    shifted = np.right_shift(bits, 16)
    np.bitwise_xor(bits, shifted, out=bits)
    np.multiply(bits, np.uint32(_MULTIPLIERS[0]), out=bits)
    np.right_shift(bits, 15, out=shifted)
    np.bitwise_xor(bits, shifted, out=bits)
    np.multiply(bits, np.uint32(_MULTIPLIERS[1]), out=bits)


def _shift64(x: Tensor, by: int) -> Tensor:
    """Logical shift of int64; torch's own is arithmetic."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed64(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _signed32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
