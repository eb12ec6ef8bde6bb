"""Counter-based random bits: where, not when; uniform; independent."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_merge.linalg import random_bits as random_bits_module
from lora_merge.linalg.random_bits import keep_threshold, mask_key, random_bits

_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1


def _split_mix(counter: int, key: int) -> int:
    x = (counter * 0x9E3779B97F4A7C15 + key) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return (x ^ (x >> 31)) >> 32


def _bits_in_plain_integers(key: int, row: int, column: int) -> int:
    x = _split_mix(row, key ^ 0x243F6A8885A308D3) ^ _split_mix(column, key ^ 0x13198A2E03707344)
    x ^= x >> 16
    x = (x * 0x7FEB352D) & _MASK32
    x ^= x >> 15
    x = (x * 0x846CA68B) & _MASK32
    return x - (1 << 32) if x >= 1 << 31 else x


@given(
    key=st.integers(0, _MASK64),
    row=st.integers(0, 1 << 33),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 7)),
)
def test_bits_are_those_of_plain_integer_arithmetic(key, row, shape):
    bits = random_bits(key, row, shape)
    expected = [
        [_bits_in_plain_integers(key, row + i, j) for j in range(shape[1])] for i in range(shape[0])
    ]
    assert bits.tolist() == expected


def test_the_gpus_arithmetic_gives_the_cpus_bits():
    bits = torch.randint(-(2**31), 2**31, (50, 60), dtype=torch.int64).to(torch.int32)
    numpy_bits = bits.clone()
    random_bits_module._mix(bits)
    random_bits_module._mix_numpy(numpy_bits.numpy().view(np.uint32))
    assert torch.equal(bits, numpy_bits)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_any_split_into_blocks_gives_the_same_bits(heights):
    whole = random_bits(7, 3, (sum(heights), 13))
    row, parts = 3, []
    for height in heights:
        parts.append(random_bits(7, row, (height, 13)))
        row += height
    assert torch.equal(torch.cat(parts), whole)


def test_the_number_of_threads_does_not_matter():
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(random_bits(1, 0, (300, 400)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("probability", [0.01, 0.2, 0.5, 0.9])
def test_the_kept_fraction_is_the_probability(probability):
    kept = random_bits(11, 0, (1000, 1000)) < keep_threshold(probability)
    spread = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - probability) < 5 * spread


def test_high_bytes_are_uniform():
    counts = torch.bincount(((random_bits(5, 0, (1024, 1024)) >> 24) + 128).flatten())
    expected = 1024 * 1024 / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 255 - 5 * 22.6 < chi_square < 255 + 5 * 22.6  # mean and deviation of chi^2, 255 degrees


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_neighbours_adapters_modules_and_seeds_are_uncorrelated():
    bits = random_bits(mask_key(0, "m", "a"), 0, (1000, 1000)).double()
    others = [mask_key(0, "m", "b"), mask_key(0, "n", "a"), mask_key(1, "m", "a")]
    pairs = [(bits, random_bits(key, 0, (1000, 1000)).double()) for key in others]
    pairs += [(bits[1:], bits[:-1]), (bits[:, 1:], bits[:, :-1]), (bits[64:], bits[:-64])]
    pairs += [(bits, bits.mT), (bits[1:, 1:], bits[:-1, :-1])]
    signs = torch.sign(bits)
    # Four corners of a rectangle: rows and columns are hashed apart, then mixed.
    pairs.append((signs[1:, 1:] * signs[:-1, :-1], signs[1:, :-1] * signs[:-1, 1:]))
    assert max(abs(_correlation(a, b)) for a, b in pairs) < 5 / 999


def test_keys_tell_names_apart():
    keys = {mask_key(s, m, a) for s in (0, 1) for m in ("x", "xy") for a in ("yz", "z")}
    assert len(keys) == 8
