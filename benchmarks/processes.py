"""Time whole processes against each other, turn by turn, and measure their peak memory."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """One finished process: wall seconds, CPU seconds of all threads, peak resident bytes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run(command: Sequence[str]) -> Run:
    """Run a command to its end; its output is kept back unless it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = process.stdout.read() if process.stdout else b""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{output.decode()}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def compare(first: Sequence[str], second: Sequence[str], rounds: int) -> tuple[float, Run, Run]:
    """Median of the per-round time ratios first / second, and the median run of each.

    One uncounted round warms the page cache; then the two take turns, so that a drifting machine
    touches both alike.
    """
    run(first), run(second)
    pairs = [(run(first), run(second)) for _ in range(rounds)]
    ratio = statistics.median(a.seconds / b.seconds for a, b in pairs)
    return ratio, _median([a for a, _ in pairs]), _median([b for _, b in pairs])


def _median(runs: Sequence[Run]) -> Run:
    return Run(
        statistics.median(r.seconds for r in runs),
        statistics.median(r.cpu_seconds for r in runs),
        int(statistics.median(r.peak_bytes for r in runs)),
    )
