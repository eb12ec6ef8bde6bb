"""The Triton kernels on the CPU, in Triton's interpreter, and compiled for GPUs nobody has here.

The interpreter is chosen when Triton is imported, so its tests run in a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/triton_suite`.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="is the interpreted process")
def test_kernels_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", HERE / "triton_suite"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="compiles nothing")
def test_kernels_compile_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler sees types, shapes and shared memory that the interpreter does not care for."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lora_merge.kernels.gated_stack import _triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"columns": "*i64", "words": "*i32", "parts": "*fp32", "bias": "*fp32"}
    pointers |= {"gate": "*fp32", "score_parts": "*fp32"}
    floats = {"temperature": "fp32", "factor": "fp32", "null_score": "fp32"}
    tensors = ("x", "down", "y", "z", "up", "out", "weights", "u_out")
    types = {**dict.fromkeys(tensors, "*bf16"), **pointers, **floats}
    exact = {"UPCAST": False, "PRECISION": "tf32"}
    shrink = {
        "BM": 16,
        "BN": 32,
        "BK": 256,
        "GATE_BK": 64,
        "SPLIT": 4,
        "GATE_UPCAST": True,
        **exact,
    }
    gate = {
        "MEMBERS": 2, "SPLIT": 4, "KIND": 3, "TOP_K": 2, "ABSOLUTE": True, "NULL": 1, "BIAS": True,
        "KEEP_U": True, "BT": 4, "BS": 32, "BR": 256,
    }  # fmt: skip
    dense = {**gate, "KIND": 4, "TOP_K": 0, "NULL": 0, "BIAS": False, "BT": 1}
    given = {**dense, "KIND": 0}
    expand = {"BM": 16, "BN": 64, "SKIP": True, "BRANCH": True, **exact}
    for kernel, constants in (
        (_triton.shrink_kernel, shrink),
        (_triton.gate_kernel, gate),
        (_triton.gate_kernel, dense),
        (_triton.gate_kernel, given),
        (_triton.expand_kernel, expand),
    ):
        signature = {
            name: "constexpr" if name in constants else types.get(name, "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert done.metadata.shared <= 227 * 1024
        assert "ptx" in done.asm
