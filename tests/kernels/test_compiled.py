"""The Triton kernels compiled for GPUs nobody has here; `triton_suite` runs them."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from lora_merge.kernels.gated_stack.gate import Rule

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="compiles nothing")
def test_kernels_compile_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler sees types, registers and shared memory that the interpreter does not know.

    Tiles are those of 28 experts of rank 8 on Llama-3-8B's gate_proj and up_proj.
    """
    from kernels.compiled import compile_kernel
    from lora_merge.kernels.gated_stack.gpu import _launch, _triton, _triton_gate_expand

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    exact = {"UPCAST": False, "PRECISION": "tf32"}
    dense, experts, wide = Rule(), 28, 2 * 14336
    odd = Rule("softmax_twice", 2, absolute=True, null_score=0.1)
    done = {}
    for tokens in (1, 16):
        tiles = _launch.shrink_tiles(tokens, 4096, 2 * 224, 132)
        assert tiles is not None
        constants = {"BM": tiles.m, "BN": tiles.n, "BK": tiles.k, "GATE_BK": tiles.k // 2,
                     "SPLIT": tiles.split, "GATE_UPCAST": True, "GATE_PRECISION": "tf32x3",
                     **exact}  # fmt: skip
        done["shrink", tokens] = compile_kernel(_triton.shrink_kernel, constants, tmp_path)
        tiles = _launch.gate_expand_tiles(tokens, wide)
        for rule, split in ((dense, 1), (Rule(top_k=2), 1), (odd, 8), (None, 8)):
            constants = {"MEMBERS": 2, "SPLIT": split, "SCORE_SPLIT": 3 if split == 1 else split,
                         "BIAS": False, "SKIP": rule != dense, "BT": tiles.m, "BN": tiles.n,
                         "BR": tiles.k, "ONE_CHUNK": tiles.k >= 224,
                         **_launch._rule(rule, experts), **exact}  # fmt: skip
            done["gate and expand", tokens, rule, split] = compile_kernel(
                _triton_gate_expand.gate_expand_kernel, constants, tmp_path, warps=tiles.warps,
                stages=tiles.stages, y="*fp32", widths=("i32", "i32"),
            )  # fmt: skip
    for rule, block in ((odd, 4), (None, 1)):
        constants = {"MEMBERS": 2, "SPLIT": 1, "SCORE_SPLIT": 1, "BIAS": True, "KEEP_U": True,
                     "BT": block, "BR": 256, **_launch._rule(rule, experts)}  # fmt: skip
        done["gate", rule, block] = compile_kernel(_triton.gate_kernel, constants, tmp_path)
    for tokens, skip in ((16, True), (128, True), (4096, False)):
        tiles = _launch.expand_tiles(tokens, 14336)
        constants = {"BM": tiles.m, "BN": tiles.n, "SKIP": skip, **exact}
        done["expand", tokens, skip] = found = compile_kernel(
            _triton.expand_kernel, constants, tmp_path, warps=tiles.warps
        )
        assert found.asynchronous, "its loop waits for every load"
    for name, found in done.items():
        assert found.shared <= 227 * 1024 and found.spilled <= 16, (name, found)
