"""Which kernels compile with the Triton that is installed, for GPUs that nobody needs to have.

    python benchmarks/compile_matrix.py            every kernel, tile, gate and dtype (minutes)
    python benchmarks/compile_matrix.py --sample   each of them at least once, as .ci/run does

Another version: `pip install --no-deps --target DIR triton==X`, and DIR as PYTHONPATH.

Compute capability 9.0 is compiled in full, 8.0, 8.9 and 10.0 by the sample; with `--minutes` a
capability is left when its time is over, and the file says how many launches were not reached. One
file per version of Triton goes to benchmarks/results/; the exit code is 1 if anything does not
compile.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

import triton

from lora_merge.kernels.gated_stack.gpu.compile_check import (
    CAPABILITIES,
    Compiled,
    chosen,
    compile_all,
)

RESULTS = Path(__file__).parent / "results"
FULL = (90,)  # compute capabilities that are compiled in full


def summary(done: Iterable[Compiled]) -> list[dict[str, Any]]:
    """One row per kernel: how many compiled, what failed, the most that any needs."""
    rows: dict[str, dict[str, Any]] = {}
    for one in done:
        row = rows.setdefault(
            one.kernel,
            {
                "kernel": one.kernel,
                "compiled": 0,
                "registers": 0,
                "spilled": 0,
                "shared": 0,
                "failed": [],
            },
        )
        if one.error:
            row["failed"].append({"setting": one.setting, "error": one.error})
            continue
        row["compiled"] += 1
        for name in ("registers", "spilled", "shared"):
            row[name] = max(row[name], getattr(one, name))
    return [*rows.values()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sample", action="store_true", help="compile no capability in full")
    parser.add_argument("--capability", type=int, nargs="*", default=CAPABILITIES)
    parser.add_argument("--minutes", type=float, default=math.inf, help="of each capability")
    parser.add_argument("--out", type=Path, help="folder for the file; default: keep none")
    options = parser.parse_args()
    document: dict[str, Any] = {"triton": triton.__version__, "capabilities": []}
    failed = 0
    for capability in options.capability:
        full, start = capability in FULL and not options.sample, time.perf_counter()
        found = chosen(capability, full=full)
        end = start + 60 * options.minutes
        in_time = takewhile(lambda _, end=end: time.perf_counter() < end, found)
        rows = summary(compile_all(in_time, capability))
        bad = sum(len(row["failed"]) for row in rows)
        good = sum(row["compiled"] for row in rows)
        failed, left = failed + bad, len(found) - good - bad
        took = time.perf_counter() - start
        title = f"triton {triton.__version__}, cc {capability / 10}"
        print(f"{title}: {good} compiled, {bad} failed, {left} left, {took:.0f} s", flush=True)
        for row in rows:
            for one in row["failed"]:
                print(f"  {row['kernel']} {one['setting']}: {one['error']}", flush=True)
        document["capabilities"].append(
            {"capability": capability, "full": full, "left": left, "kernels": rows}
        )
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            path = options.out / f"compile-triton-{triton.__version__}.json"
            path.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
