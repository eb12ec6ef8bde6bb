"""What the compiler makes of a Triton kernel for a GPU that nobody needs to have."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {"columns": "*i64", "words": "*i32"} | dict.fromkeys(
    ("temperature", "factor", "null_score"), "fp32"
)
_HALF = ("x", "down", "y", "z", "up", "out", "u_out")
_WIDE = ("parts", "score_parts", "bias", "gate")
# Arguments that are multiples of 16 for the shapes of Llama-3-8B.
_EVEN = ("stride_x", "stride_y", "stride_z", "stride_parts", "part_step", "units", "width", "start")


@dataclass(frozen=True)
class Compiled:
    """Resources of a kernel on compute capability 9.0.

    Attributes:
        registers: Per thread.
        spilled: Bytes of local memory and stack per thread.
        shared: Bytes of shared memory per program.
        asynchronous: Copies to shared memory that the arithmetic does not wait for.
    """

    registers: int
    spilled: int
    shared: int
    asynchronous: int


def compile_kernel(
    kernel: Any, constants: dict[str, Any], work: Path, *, warps: int = 4, stages: int = 3,
    **types: Any,
) -> Compiled:  # fmt: skip
    """Compile for cc 9.0 with bfloat16 factors, float32 scores and aligned rows."""
    known = {**_TYPES, **dict.fromkeys(_HALF, "*bf16"), **dict.fromkeys(_WIDE, "*fp32"), **types}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else known.get(name, "i32")
        signature[name] = kind
        if name in _EVEN or str(kind).startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
        if isinstance(kind, tuple):
            attributes |= {(place, i): [["tt.divisibility", 16]] for i in range(len(kind))}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    binary = work / "kernel.cubin"
    binary.write_bytes(done.asm["cubin"])
    usage = _dump("-res-usage", binary)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    copies = len(re.findall(r"\bLDGSTS\b", _dump("-sass", binary)))
    return Compiled(registers, stack + local, done.metadata.shared, copies)


def _dump(what: str, binary: Path) -> str:
    command = [_TOOLS / "cuobjdump", what, binary]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
