"""The kernels that group tokens, compiled at the shapes of Llama-3-8B with 64 experts of rank 16.

They must not spill registers, and their loads must be in flight while others are multiplied.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or bool(os.environ.get("TRITON_INTERPRET")),
    reason="triton is not installed, or interprets",
)

TYPES = {"weights": "*fp32"} | dict.fromkeys(
    ("experts", "counts", "order", "blocks", "segments"), "*i32"
)
EXACT = {"UPCAST": False, "PRECISION": "tf32"}


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def make(name: str, constants: dict[str, object], **how: int) -> Any:
        from kernels.compiled import compile_kernel
        from lora_merge.kernels.gated_stack.gpu import _triton, _triton_grouped

        room = _triton if name == "score_kernel" else _triton_grouped
        done = compile_kernel(getattr(room, name), constants, tmp_path, **how, **TYPES)
        assert done.spilled <= 16 and done.shared <= 227 * 1024
        return done

    return make


def test_two_programs_of_the_scores_share_a_processor(build) -> None:
    shape = {"BM": 128, "BN": 64, "BK": 64, "SPLIT": 4, "PIECES": 3, "UPCAST": False}
    done = build("score_kernel", shape, warps=8)
    assert done.asynchronous
    assert 2 * done.shared <= 227 * 1024 and 2 * 256 * done.registers <= 65536


def test_routing_and_placing_stay_in_registers(build) -> None:
    rule = {"TOP_K": 2, "ABSOLUTE": True, "BIAS": True, "SPLIT": 14}
    build("route_kernel", {"BT": 32, "BS": 64, "KIND": 1, "NULL": 0, **rule})
    build("route_kernel", {"BT": 16, "BS": 128, "KIND": 3, "NULL": 1, **rule})
    build("place_kernel", {"TOP_K": 2, "BM": 32, "BT": 32, "BS": 64})


@pytest.mark.parametrize(("rank", "stages"), [(16, 4), (128, 3)])
def test_shrink_has_loads_in_flight(rank: int, stages: int, build) -> None:
    shape = {"TOP_K": 2, "BM": 32, "BR": rank, "BK": 128, **EXACT}
    assert build("shrink_kernel", shape, stages=stages).asynchronous


@pytest.mark.parametrize(("rank", "columns"), [(16, 128), (128, 64)])
def test_expand_has_rows_of_the_output_in_flight(rank: int, columns: int, build) -> None:
    shape = {"BM": 32, "BR": rank, "BN": columns, "TILES": 4, **EXACT}
    done = build("expand_kernel", shape)
    # Copies of 16 bytes that one of 128 threads makes for a tile of `up` and of y, in each stage.
    assert done.asynchronous >= 3 * (rank + 32) * columns * 2 // (128 * 16)
