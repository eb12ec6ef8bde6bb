"""`lora-merge cluster` against a bare load-and-save script, and its memory.

    python benchmarks/cluster.py [--work DIR] [--rounds 5] [--many 64]

Prints, for four r=16 adapters of Llama-3-8B's shape: the ratio of whole-process times, and peak
memory against its budget (import baseline + output + 4 x the largest module's stack in float32),
for four and for many adapters; then the start-up time of `lora-merge --help`.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from llama_shapes import PROJECTIONS, make_adapters
from processes import compare, run

HERE = Path(__file__).parent
RANK = 16
COMMAND = [sys.executable, "-m", "lora_merge"]
IMPORTS = "import lora_merge.merge.run, lora_merge.adapters.adapter, lora_merge.cli.views.merge"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "lora-merge-bench"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--many", type=int, default=64)
    arguments = parser.parse_args()
    work: Path = arguments.work
    four = make_adapters(work / "adapters", 4, RANK)
    _time(work, four, arguments.rounds)
    baseline = run([sys.executable, "-c", IMPORTS]).peak_bytes
    print(f"import baseline: {baseline / 1e6:.0f} MB")
    _memory(work, four, baseline)
    if arguments.many:
        _memory(work, make_adapters(work / "adapters", arguments.many, RANK), baseline)
    _start_up(arguments.rounds)


def _cluster(work: Path, adapters: list[Path]) -> list[str]:
    out = work / "merged"
    return [
        *COMMAND,
        "cluster",
        *map(str, adapters),
        "--rank",
        str(RANK),
        "--force",
        "-o",
        str(out),
    ]


def _time(work: Path, adapters: list[Path], rounds: int) -> None:
    bare = [sys.executable, str(HERE / "bare.py"), str(work / "bare"), "1", *map(str, adapters)]
    ratio, ours, theirs = compare(_cluster(work, adapters), bare, rounds)
    print(
        f"cluster {len(adapters)} x r{RANK}: {ours.seconds:.2f} s, bare {theirs.seconds:.2f} s, "
        f"ratio {ratio:.2f} (aim 2.0)"
    )


def _memory(work: Path, adapters: list[Path], baseline: int) -> None:
    shutil.rmtree(work / "merged", ignore_errors=True)
    used = run(_cluster(work, adapters))
    output = (work / "merged" / "adapter_model.safetensors").stat().st_size
    widest = max(d_out + d_in for d_out, d_in in PROJECTIONS.values())
    stack = widest * RANK * len(adapters) * 4
    budget = baseline + output + 4 * stack
    print(
        f"cluster {len(adapters)} x r{RANK}: {used.seconds:.1f} s, "
        f"peak {used.peak_bytes / 1e6:.0f} MB, "
        f"budget {budget / 1e6:.0f} MB (output {output / 1e6:.0f}, stack {stack / 1e6:.0f})"
    )


def _start_up(rounds: int) -> None:
    python = [sys.executable, "-c", "pass"]
    ratio, ours, bare = compare([*COMMAND, "--help"], python, rounds)
    probe = (
        "import sys; from lora_merge.cli.app import run; run(['--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    clean = subprocess.run([sys.executable, "-c", probe], stdout=subprocess.DEVNULL, check=False)
    print(
        f"--help: {ours.seconds:.3f} s ({ratio:.1f} x an empty Python's {bare.seconds:.3f} s; aim "
        f"0.3 s), torch {'not imported' if clean.returncode == 0 else 'IMPORTED'}"
    )


if __name__ == "__main__":
    main()
