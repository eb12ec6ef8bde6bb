"""Compile the kernels for a GPU that nobody needs to have, and say what came of each."""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_merge.kernels.gated_stack.gpu import _launch
from lora_merge.kernels.gated_stack.gpu.recorded_launches import Launch, launches, sample

CAPABILITIES = (80, 89, 90, 100)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
_EXCHANGES = ("BAR", "SHFL", "ACQBULK")  # with other threads, or with the kernel before
SHARED = {80: 163, 89: 99, 90: 227, 100: 227}  # kB of shared memory that a program may have


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch.

    Attributes:
        kernel: Name, with its family.
        capability: Ten times the compute capability.
        setting: The constants, as text.
        error: Why it cannot run; empty if it can.
        registers: Per thread; 0 where Triton brings no cuobjdump along.
        spilled: Bytes of local memory and stack per thread.
        shared: Bytes of shared memory per program.
        asynchronous: Copies to shared memory that the arithmetic does not wait for.
        ahead: Loads of 16 bytes that a thread asks for before it waits for another.
        instructions: Of the whole kernel.
    """

    kernel: str
    capability: int
    setting: str
    error: str = ""
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    asynchronous: int = 0
    ahead: int = 0
    instructions: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def triton_version() -> str:
    """Version of the compiler."""
    import triton

    return str(triton.__version__)


def refusal() -> str:
    """Why no kernel can be compiled here, whether or not it could run; empty if they can."""
    if torch.version.hip is not None:
        return "kernels are compiled for CUDA alone"
    return "TRITON_INTERPRET is set" if _launch.INTERPRETED else ""


def targets(device: torch.device) -> tuple[int, ...]:
    """Compute capability of a GPU, times ten; without one those that the kernels are made for."""
    if device.type != "cuda":
        return CAPABILITIES
    major, minor = torch.cuda.get_device_capability(device)
    return (10 * major + minor,)


def chosen(capability: int, *, full: bool = False) -> list[Launch]:
    """Launches that the tile choosers can ask for.

    Args:
        capability: Ten times the compute capability.
        full: Every kernel, tile, gate and dtype together, some hundred; default: few launches in
            which every one of them occurs.
    """
    found = launches(capability)
    return found if full else sample(found)


def compile_all(found: Iterable[Launch], capability: int) -> Iterator[Compiled]:
    """Compile launches one after another; a failure is a result."""
    for launch in found:
        names = {n: v for n, v in launch.constants.items() if isinstance(n, str)}
        setting = " ".join(f"{name}={value}" for name, value in names.items())
        try:
            yield compile_one(launch, capability)
        except Exception as error:
            last = (str(error).strip() or type(error).__name__).splitlines()[-1]
            yield Compiled(
                launch.name, capability, setting, f"{type(error).__name__}: {last}"[:200]
            )


def compile_one(launch: Launch, capability: int) -> Compiled:
    """Compile one launch.

    Raises:
        Exception: Whatever the compiler raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {path: [["tt.divisibility", 16]] for path in launch.aligned}
    source = ASTSource(
        fn=launch.kernel, signature=launch.signature, constexprs=launch.constants, attrs=attributes
    )
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    names = {n: v for n, v in launch.constants.items() if isinstance(n, str)}
    setting = " ".join(f"{name}={value}" for name, value in names.items())
    shared = int(done.metadata.shared)
    usage = _usage(done.asm["cubin"])
    most = SHARED.get(capability, 99) << 10
    error = f"wants {shared} bytes of shared memory of {most}" if shared > most else ""
    return Compiled(launch.name, capability, setting, error, shared=shared, **usage)


def _usage(binary: bytes) -> dict[str, int]:
    """What `Compiled` says of a binary."""
    tool = _tool()
    if not tool.exists():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        found = re.search(
            r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _dump(tool, "-res-usage", path)
        )
        steps = _INSTRUCTION.findall(_dump(tool, "-sass", path))
    registers, stack, local = map(int, found.groups()) if found else (0, 0, 0)
    waits = (i for i, step in enumerate(steps) if step.startswith(_EXCHANGES))
    ahead = steps[: next(waits, len(steps))]
    return {
        "registers": registers, "spilled": stack + local,
        "asynchronous": sum(step.startswith("LDGSTS") for step in steps),
        "ahead": sum(step.startswith("LDG.E.128") for step in ahead), "instructions": len(steps),
    }  # fmt: skip


def _tool() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _dump(tool: Path, what: str, path: Path) -> str:
    command = [str(tool), what, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout
